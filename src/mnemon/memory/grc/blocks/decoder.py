"""A language model that reads segment after segment, with or without a memory between them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.blocks.encoder import FeedForward
from mnemon.memory.grc.hosts import Host, split_heads

__all__ = ["DecoderState", "LayerState", "RecurrentAttention", "RecurrentDecoder"]


class LayerState(NamedTuple):
    """What a layer hands from one segment to the next; constants, without gradients.

    Args:
        hidden: the latest inputs of the layer (Transformer-XL's memory); None keeps none.
        summary: of the segment that is not in `cache` yet; None before the first.
        cache: the memory's slots for each stream; None in a layer without a memory.
    """

    hidden: Float[Tensor, "batch kept channels"] | None = None
    summary: Float[Tensor, "batch slots kept"] | None = None
    cache: Float[Tensor, "batch slots kept"] | None = None


DecoderState: TypeAlias = tuple[LayerState, ...]


@final
class RecurrentAttention(Host):
    """Causal attention within a segment, and to what came before it.

    Two memories, each on or off: the latest `recurrence` inputs of this layer, attended to like
    the segment's own (Transformer-XL), and a gated recurrent cache for each stream (`add_grc`). A
    token must not read what is made of later ones: a segment reads the cache as the segments
    before have left it. Its update with the segment before is computed within the graph of the
    segment that reads it, from constants: so the gates learn, through one step.

    Positions are rotary. Source: Transformer-XL, arXiv 1901.02860; RoPE, arXiv 2104.09864.

    Args:
        dim: channels; a multiple of `num_heads`, heads of an even width.
        num_heads: heads.
        recurrence: tokens of earlier segments to attend to; 0 for none.
    """

    def __init__(self, dim: int, num_heads: int, recurrence: int = 0) -> None:
        super().__init__(dim, num_heads)
        if dim // num_heads % 2:
            raise LearnedMemoryError(
                f"heads of {dim // num_heads} channels came; an even number was expected"
            )
        self.recurrence = recurrence
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], state: LayerState
    ) -> tuple[Float[Tensor, "batch tokens channels"], LayerState]:
        """One segment.

        Args:
            x: the segment.
            state: from the segment before; `LayerState()` at the beginning.

        Returns:
            The output, and the state for the next segment.
        """
        before = state.hidden
        seen = x if before is None else torch.cat([before.to(x.dtype), x], dim=1)
        length, total = x.shape[1], seen.shape[1]
        q, k, v = (
            split_heads(p(t), self.num_heads)
            for p, t in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        place = torch.arange(total, device=x.device)
        allowed = place[None, :] <= place[total - length :, None]
        attended = functional.scaled_dot_product_attention(
            _rotated(q, place[total - length :]), _rotated(k, place), v, attn_mask=allowed
        )
        together = attended.transpose(1, 2).reshape(x.shape)
        mixed, summary, cache = self._with_cache(x, together, state)
        hidden = seen[:, -self.recurrence :].detach() if self.recurrence else None
        return self.out(mixed), LayerState(hidden, summary, cache)

    def _with_cache(
        self, x: Tensor, together: Tensor, state: LayerState
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        branch = self.memory
        if branch is None:
            return together, None, None
        old = state.cache
        if old is None:
            old = branch.cache.cache.detach().clone().expand(len(x), -1, -1)
        if state.summary is not None and not branch.cache.pinned:
            old = branch.cache.update(state.summary, old)
        tokens = branch.tokens(x, together)
        summary = branch.cache.summarise(tokens).detach()
        mixed = branch.mix(tokens, together, old, causal=True)
        return mixed, summary, old.detach()


def _rotated(
    x: Float[Tensor, "batch heads tokens head_dim"], place: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    half = x.shape[-1] // 2
    power = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = place[:, None].to(torch.float32) * 10_000.0**-power
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@final
class _DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, recurrence: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = RecurrentAttention(dim, num_heads, recurrence)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        attended, state = self.attention(self.attention_norm(x), state)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), state


@final
class RecurrentDecoder(nn.Module):
    """A decoder over segments: state in, state out.

    Args:
        vocab_size: different tokens.
        dim: channels.
        num_heads: heads.
        num_layers: blocks.
        hidden: channels within a feed-forward.
        recurrence: tokens of earlier segments that every layer attends to (Transformer-XL).
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        num_heads: int,
        num_layers: int,
        hidden: int,
        recurrence: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            _DecoderBlock(dim, num_heads, hidden, recurrence) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocab"], DecoderState]:
        """Logits of the next token at each place of a segment.

        Args:
            ids: the segment, a row for each stream.
            state: from the segment before of the same streams; None at the beginning.
        """
        states = state or (LayerState(),) * len(self.blocks)
        x = self.embedding(ids)
        after = []
        for block, before in zip(self.blocks, states, strict=True):
            x, found = block(x, before)
            after.append(found)
        return self.head(self.norm(x)), tuple(after)
