"""A layer that keeps nothing: it reads another layer's keys, or has no attention at all."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes

__all__ = ["SharedLayer"]


@final
class SharedLayer(CacheLayer):
    """Keeps nothing, so every verb is a no-op but `append`, which raises `UnsupportedVerb`."""

    kind = "shared"
    is_dummy = True
    is_compileable = True
    counts_tokens = False

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedVerb(
            "This layer shares another layer's keys and values (or has no attention); its model "
            "must not append to it."
        )

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    @property
    def num_tokens(self) -> int:
        return 0

    @property
    def num_stored(self) -> int:
        return 0

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return num_new, 0

    def can_crop(self, num_tokens: int) -> bool:
        return True

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)

    def keep(self, indices: torch.Tensor) -> None:
        pass

    def reset(self) -> None:
        pass

    @property
    def batch_size(self) -> int:
        return -1

    def reorder(self, index: torch.Tensor) -> None:
        pass

    def select(self, index: torch.Tensor) -> None:
        pass

    def merge(self, others: Sequence["SharedLayer"]) -> "SharedLayer":
        return SharedLayer()

    def extract(self, row: int, num_padding: int = 0) -> "SharedLayer":
        return SharedLayer()

    def fork(self) -> "SharedLayer":
        return SharedLayer()

    def state(self) -> LayerState:
        return LayerState(kind=self.kind)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def nbytes_reserved(self) -> int:
        return 0
