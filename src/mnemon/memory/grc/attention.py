"""Multi-head self-attention, plain and with a gated recurrent cache."""

from __future__ import annotations

import abc
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.branch import Grid, MemoryBranch
from mnemon.memory.grc.hosts import Host, split_heads
from mnemon.memory.grc.settings import Settings, Variant

__all__ = ["GRCAttention", "SelfAttention"]


class _Attention(Host, abc.ABC):
    """Projections and the self-attention between them."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        *,
        real: Bool[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "*batch tokens tokens"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attention among the tokens of each sample.

        Args:
            x: the tokens.
            real: False at padding: nobody attends to it, and it does not reach the memory.
            mask: True where a query (second to last) may attend to a key; for all samples or for
                each. A token that no query may see does not reach the memory either. The memory is
                made of all others and read by every query: a mask that hides the future does not
                hide it there (`RecurrentDecoder` is made for that).
            grid: how tokens lie in an image; for the variant "repo".

        Raises:
            LearnedMemoryError: masks of another shape or type.
        """
        batch, length = x.shape[:2]
        allowed, real = _joined(real, mask, batch, length)
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0
        )
        together = attended.transpose(1, 2).reshape(batch, length, self.dim)
        if allowed is not None:  # queries that see nothing: NaN, zero or a mean, by kernel
            sees = allowed.any(dim=-1).squeeze(1)[..., None]
            together = torch.where(sees, together, torch.zeros_like(together))
        found: Tensor = self.out(self.remembered(x, together, real, grid))
        return found


def _joined(
    real: Tensor | None, mask: Tensor | None, batch: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """What each query may see ``(batch, 1, queries, keys)``, and which tokens are real."""
    for name, found, shapes in (
        ("real", real, ((batch, length),)),
        ("mask", mask, ((length, length), (batch, length, length))),
    ):
        if found is not None and (found.dtype != torch.bool or found.shape not in shapes):
            raise LearnedMemoryError(
                f"{name} of shape {tuple(found.shape)} and {found.dtype} came; torch.bool of shape "
                f"{' or '.join(map(str, shapes))} was expected, True where a token counts"
            )
    if mask is None:
        return (None if real is None else real[:, None, None, :]), real
    allowed = mask.expand(batch, length, length)
    if real is not None:
        allowed = allowed & real[:, None, :]
    return allowed[:, None], allowed.any(dim=1)


@final
class SelfAttention(_Attention):
    """Plain multi-head self-attention, until `add_grc` gives it a memory.

    Args:
        dim: channels; a multiple of `num_heads`.
        num_heads: heads.
        dropout: of attention weights, in training.
    """


@final
class GRCAttention(_Attention):
    """Multi-head self-attention with a gated recurrent cache.

    Source: Cached Transformers, arXiv 2312.12742, eq. 2 to 5 and algorithm 1.

    Args:
        dim: channels (D); a multiple of `num_heads`.
        num_heads: heads (H).
        ratio: share of the channels that is kept.
        memory_length: slots (T_m).
        variant: "paper" or "repo"; see `GatedRecurrentCache` and `MemoryBranch`.
        dropout: of the self-attention's weights, in training.
        initial_lambda: where the mixing weights start, before the sigmoid; None: 0 or -1.
        pinned: never write the buffer.
        synchronise: average the buffer over all ranks where torch.distributed runs.

    Raises:
        LearnedMemoryError: an option outside its bounds.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: float = 0.5,
        memory_length: int = 64,
        variant: Variant = "paper",
        dropout: float = 0.0,
        initial_lambda: float | None = None,
        pinned: bool = False,
        synchronise: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, dropout=dropout)
        settings = Settings(
            ratio=ratio,
            memory_length=memory_length,
            variant=variant,
            initial_lambda=initial_lambda,
            pinned=pinned,
            synchronise=synchronise,
        )
        self.memory = MemoryBranch(dim, num_heads, settings)
