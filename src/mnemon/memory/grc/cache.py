"""The cache of GRC attention: gates, candidate, and a buffer that training moves."""

from __future__ import annotations

import abc
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc import ranks
from mnemon.memory.grc.interpolate import interpolate_tokens
from mnemon.memory.grc.settings import Variant, summary_width

__all__ = ["GatedRecurrentCache", "MemoryCache", "Step"]


class Step(NamedTuple):
    """What one step makes of a cache.

    Args:
        caches: one for each sample.
        mean: over the samples that have a real token; the old one where none has.
        num_rows: how many have one.
    """

    caches: Float[Tensor, "batch slots kept"]
    mean: Float[Tensor, "slots kept"]
    num_rows: Float[Tensor, ""]


class MemoryCache(nn.Module, abc.ABC):
    """A buffer of slots with a rule for its update; `forward` says what attention reads.

    Training: the buffer becomes the mean over the samples of their updates (over all ranks of
    torch.distributed). Evaluation: it stays, as the statistics of a batch norm do. Gradients go
    through one update, never into the graph of the step before. Rows of a batch that hold padding
    only count for nothing.

    Gradient checkpointing computes a forward twice. The second time, in the backward, starts from
    the buffer as the first found it and writes nothing.

    Args:
        dim: channels of the tokens (D).
        num_heads: the kept channels are a multiple of this.
        ratio: share of the channels kept.
        memory_length: slots (T_m).
        variant: "paper": attention reads the mean, and at evaluation the buffer; "repo": each
            sample reads its own update, also at evaluation.
        pinned: never write the buffer. "paper" then reads it as it is, "repo" its update.
        synchronise: average over all ranks where torch.distributed runs.

    Attributes:
        cache: the buffer (C), zeros at first; part of the state_dict from the beginning.
    """

    cache: Float[Tensor, "slots kept"]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        ratio: float = 0.5,
        memory_length: int = 64,
        variant: Variant = "paper",
        pinned: bool = False,
        synchronise: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.kept = summary_width(dim, num_heads, ratio)
        self.memory_length = memory_length
        self.variant = variant
        self.pinned = pinned
        self.synchronise = synchronise
        self.register_buffer("cache", torch.zeros(memory_length, self.kept))
        self._latest: tuple[Tensor, Tensor] | None = None  # buffer before, fingerprint

    @abc.abstractmethod
    def update(
        self,
        summary: Float[Tensor, "batch slots kept"],
        cache: Float[Tensor, "batch slots kept"],
    ) -> Float[Tensor, "batch slots kept"]:
        """Each sample's new cache; no other state is read or written."""

    def summarise(
        self,
        x: Float[Tensor, "batch tokens channels"],
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch slots kept"]:
        """The first channels of the real tokens, interpolated to the slots."""
        if x.shape[-1] != self.dim:
            raise LearnedMemoryError(
                f"tokens of {x.shape[-1]} channels came; this cache was made for {self.dim}"
            )
        return interpolate_tokens(x[..., : self.kept], self.memory_length, real)

    def step(
        self,
        x: Float[Tensor, "batch tokens channels"],
        cache: Float[Tensor, "*batch slots kept"],
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Step:
        """One update: state in, state out; the buffer is neither read nor written.

        Args:
            x: the tokens.
            cache: the old state, one for all samples or one for each; taken as a constant.
            real: False at padding.
        """
        return self._stepped(self.summarise(x, real), cache, real)

    def _stepped(self, summary: Tensor, cache: Tensor, real: Tensor | None) -> Step:
        old = cache.detach()
        caches = self.update(summary, old.expand(len(summary), -1, -1))
        if real is None:
            count = torch.full((), float(len(summary)), device=summary.device)
            return Step(caches, caches.mean(dim=0), count)
        has = real.any(dim=1)
        count = has.sum()
        caches = torch.where(has[:, None, None], caches, old)
        total = torch.where(has[:, None, None], caches, torch.zeros_like(caches)).sum(dim=0)
        unmoved = old if old.dim() == 2 else old.mean(dim=0)
        mean = torch.where(count > 0, total / count.clamp(min=1), unmoved)
        return Step(caches, mean.to(caches.dtype), count.to(torch.float32))

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "rows slots kept"]:
        """Updates the buffer (in training) and returns what attention reads.

        Returns:
            One cache for each sample, or a single one for all.

        Raises:
            LearnedMemoryError: another number of channels; or gradient checkpointing computes
                again a forward that was not the latest.
        """
        own = self.variant == "repo"
        if not own and (self.pinned or not self.training):
            return self.cache.clone()[None]  # DDP writes buffers while a graph may hold them
        summary = self.summarise(x, real)
        if self.pinned or not self.training:
            return self._stepped(summary, self.cache.clone(), real).caches
        again = not torch.compiler.is_compiling() and _in_backward()
        before = self._found_before(summary) if again else self.cache.clone()
        step = self._stepped(summary, before, real)
        several = self.synchronise and ranks.several_ranks()
        if not again:
            self._write(step, before, summary, several)
        if own:
            return step.caches
        if several:  # the value of all ranks, the gradient of this one
            return (step.mean + (self.cache - step.mean).detach())[None]
        return step.mean[None]

    @torch.no_grad()
    def _write(self, step: Step, before: Tensor, summary: Tensor, several: bool) -> None:
        if not torch.compiler.is_compiling():
            self._latest = before, summary.detach().sum(dim=(1, 2))
        mean = step.mean.detach().to(before.dtype)
        self.cache.copy_(ranks.mean_over_ranks(mean, step.num_rows, before) if several else mean)

    def _found_before(self, summary: Tensor) -> Tensor:
        """The buffer as the forward that is computed again had found it."""
        if self._latest is not None:
            before, fingerprint = self._latest
            if torch.equal(fingerprint, summary.detach().sum(dim=(1, 2))):
                return before
        raise LearnedMemoryError(
            "gradient checkpointing computes a forward again that was not this cache's latest, and "
            "the memory that it had read is gone; run backward after each forward, or leave "
            "gradient checkpointing off"
        )

    def extra_repr(self) -> str:
        pinned = ", pinned" if self.pinned else ""
        return (
            f"{self.dim}, kept={self.kept}, memory_length={self.memory_length}, "
            f"variant={self.variant!r}{pinned}"
        )


@final
class GatedRecurrentCache(MemoryCache):
    """The gated recurrent cache.

        g_u = sigmoid(W_u [x, C])    g_r = sigmoid(W_r [x, C])    c = W_c [x, g_r * C]
        C' = (1 - g_u) * C + g_u * c

    "repo" concatenates as [C, x], and its candidate is LayerNorm(GELU(W_c [...])).

    Source: Cached Transformers, arXiv 2312.12742, eq. 4 and 5; its public code for "repo". Biases
    are our choice.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        ratio: float = 0.5,
        memory_length: int = 64,
        variant: Variant = "paper",
        pinned: bool = False,
        synchronise: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            ratio=ratio,
            memory_length=memory_length,
            variant=variant,
            pinned=pinned,
            synchronise=synchronise,
        )
        self.update_gate = nn.Linear(2 * self.kept, self.kept)
        self.reset_gate = nn.Linear(2 * self.kept, self.kept)
        self.candidate = nn.Linear(2 * self.kept, self.kept)
        self.norm = nn.LayerNorm(self.kept) if variant == "repo" else None

    def gates(
        self,
        summary: Float[Tensor, "batch slots kept"],
        cache: Float[Tensor, "batch slots kept"],
    ) -> tuple[Float[Tensor, "batch slots kept"], Float[Tensor, "batch slots kept"]]:
        """The update gate and the reset gate, each in (0, 1) (eq. 4)."""
        joined = self._joined(summary, cache)
        return torch.sigmoid(self.update_gate(joined)), torch.sigmoid(self.reset_gate(joined))

    def update(
        self,
        summary: Float[Tensor, "batch slots kept"],
        cache: Float[Tensor, "batch slots kept"],
    ) -> Float[Tensor, "batch slots kept"]:
        """Each sample's new cache: a convex combination of the old one and a candidate (eq. 5)."""
        update, reset = self.gates(summary, cache)
        new: Tensor = self.candidate(self._joined(summary, reset * cache))
        if self.norm is not None:
            new = self.norm(functional.gelu(new))
        return (1 - update) * cache + update * new

    def _joined(self, summary: Tensor, cache: Tensor) -> Tensor:
        pair = (cache, summary) if self.variant == "repo" else (summary, cache)
        return torch.cat([part.to(cache.dtype) for part in pair], dim=-1)


def _in_backward() -> bool:
    """Whether this thread is in a backward pass: only there does checkpointing compute again."""
    return bool(torch._C._current_graph_task_id() != -1)
