"""The control: a cache without gates that keeps the latest tokens."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mnemon.memory.grc.cache import MemoryCache

__all__ = ["FifoCache"]


@final
class FifoCache(MemoryCache):
    """First in, first out: each step a quarter of the slots makes room for new ones.

    The new slots are the sample's summary, averaged over groups of neighbouring slots; nothing is
    learned about what to keep. As Transformer-XL's memory does, the buffer holds what the steps
    just before have seen.

    Source: the control "Transformer-XL cache" of arXiv 2312.12742; a quarter at a time is our
    choice, for a step of training brings more tokens than there are slots.
    """

    def update(
        self,
        summary: Float[Tensor, "batch slots kept"],
        cache: Float[Tensor, "batch slots kept"],
    ) -> Float[Tensor, "batch slots kept"]:
        """Each sample's new cache: the old one moved up, its summary behind."""
        count = max(1, self.memory_length // 4)
        pooled = torch.nn.functional.adaptive_avg_pool1d(summary.transpose(1, 2), count)
        new = pooled.transpose(1, 2).detach().to(cache.dtype)
        return torch.cat([cache[:, count:], new], dim=1)
