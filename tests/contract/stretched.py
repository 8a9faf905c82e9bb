"""A packed layer under the contract suite: each of its few tokens stands for many equal ones.

The suite feeds single tokens; packed layers store blocks of 64. `Stretched` hands every token on
`TIMES` times, so that a handful of tokens crosses block boundaries at odd places.
"""

from collections.abc import Sequence
from typing import Any, final

import torch

from mnemon.layers import CacheLayer, LayerState

__all__ = ["TIMES", "Stretched"]

TIMES = 37


@final
class Stretched(CacheLayer):
    """`inner` with every token repeated; all verbs count the suite's tokens."""

    def __init__(self, inner: CacheLayer) -> None:
        self.inner = inner
        self.kind = inner.kind  # type: ignore[misc]
        self.is_sliding = inner.is_sliding

    def _thin(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., ::TIMES, :]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.inner.append(
            keys.repeat_interleave(TIMES, dim=-2), values.repeat_interleave(TIMES, dim=-2)
        )
        return self._thin(pair[0]), self._thin(pair[1])

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        view = self.inner.view()
        return None if view is None else (self._thin(view[0]), self._thin(view[1]))

    @property
    def num_tokens(self) -> int:
        return self.inner.num_tokens // TIMES

    @property
    def num_stored(self) -> int:
        assert self.inner.num_stored % TIMES == 0
        return self.inner.num_stored // TIMES

    def mask_sizes(self, num_new: int) -> tuple[int, int]:
        length, offset = self.inner.mask_sizes(num_new * TIMES)
        return length // TIMES, offset // TIMES

    def can_crop(self, num_tokens: int) -> bool:
        return self.inner.can_crop(num_tokens * TIMES)

    def crop(self, num_tokens: int) -> None:
        self.inner.crop(num_tokens * TIMES)

    def set_recording(self, on: bool) -> None:
        self.inner.set_recording(on)

    def record_last(self) -> None:
        self.inner.record_last()

    @property
    def is_recording(self) -> bool:
        return self.inner.is_recording

    def keep(self, indices: torch.Tensor) -> None:
        many = indices[..., None] * TIMES + torch.arange(TIMES)
        self.inner.keep(many.flatten(-2))

    def reset(self) -> None:
        self.inner.reset()

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    def reorder(self, index: torch.Tensor) -> None:
        self.inner.reorder(index)

    def select(self, index: torch.Tensor) -> None:
        self.inner.select(index)

    def merge(self, others: Sequence[Any]) -> "Stretched":
        return Stretched(self.inner.merge([getattr(other, "inner", other) for other in others]))

    def extract(self, row: int, num_padding: int = 0) -> "Stretched":
        return Stretched(self.inner.extract(row, num_padding * TIMES))

    def fork(self) -> "Stretched":
        return Stretched(self.inner.fork())

    def state(self) -> LayerState:
        return self.inner.state()

    def load_state(self, state: LayerState) -> None:
        self.inner.load_state(state)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def nbytes_reserved(self) -> int:
        return self.inner.nbytes_reserved
