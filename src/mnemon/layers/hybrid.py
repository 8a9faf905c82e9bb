"""A layer composed of parts: attention beside a recurrent state, or beside an indexer."""

from collections.abc import Mapping, Sequence
from typing import final

import torch

from mnemon.errors import CacheError
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes
from mnemon.layers.indexer import IndexerLayer
from mnemon.layers.recurrent import RecurrentLayer

__all__ = ["HybridLayer"]


@final
class HybridLayer(CacheLayer):
    """Attention and what stands beside it, as one layer. Every verb goes to every part.

    Keys and values go to `attention`, states to `recurrent`, indexer keys to `indexer`. A verb
    that one part refuses is refused before another part has carried it out.

    Args:
        attention: any layer that keeps tokens.
        recurrent: states beside it, if any.
        indexer: indexer keys beside it, if any.
    """

    kind = "hybrid"

    def __init__(
        self,
        attention: CacheLayer,
        *,
        recurrent: RecurrentLayer | None = None,
        indexer: IndexerLayer | None = None,
    ) -> None:
        self.attention = attention
        self.recurrent = recurrent
        self.indexer = indexer
        self.is_sliding = attention.is_sliding
        # transformers counts a layer with full attention beside its state as an attention layer.
        self.is_linear = recurrent is not None and attention.is_sliding
        self.is_compileable = all(part.is_compileable for part in self.parts)

    @property
    def parts(self) -> tuple[CacheLayer, ...]:
        parts = (self.attention, self.recurrent, self.indexer)
        return tuple(part for part in parts if part is not None)

    def _like(self, parts: Sequence[CacheLayer]) -> "HybridLayer":
        attention, *rest = parts
        recurrent = next((part for part in rest if isinstance(part, RecurrentLayer)), None)
        indexer = next((part for part in rest if isinstance(part, IndexerLayer)), None)
        return HybridLayer(attention, recurrent=recurrent, indexer=indexer)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention.append(keys, values)

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        part = self.recurrent or self.attention  # the latter refuses with the right message
        return part.update_conv_state(conv_states, state_idx, conv_kernel_size)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0
    ) -> torch.Tensor:
        return (self.recurrent or self.attention).update_recurrent_state(
            recurrent_states, state_idx
        )

    def conv_state(self, state_idx: int = 0) -> torch.Tensor | None:
        return (self.recurrent or self.attention).conv_state(state_idx)

    def recurrent_state(self, state_idx: int = 0) -> torch.Tensor | None:
        return (self.recurrent or self.attention).recurrent_state(state_idx)

    @property
    def conv_states(self) -> Mapping[int, torch.Tensor | None]:
        return (self.recurrent or self.attention).conv_states

    @property
    def recurrent_states(self) -> Mapping[int, torch.Tensor | None]:
        return (self.recurrent or self.attention).recurrent_states

    def has_state(self, state_idx: int | None = None) -> bool:
        return (self.recurrent or self.attention).has_state(state_idx)

    def update_indexer(self, indexer_keys: torch.Tensor) -> torch.Tensor:
        return (self.indexer or self.attention).update_indexer(indexer_keys)

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        return None if self.indexer is None else self.indexer.indexer_keys

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        return None if self.indexer is None else self.indexer.indexer_position_ids

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor | None) -> None:
        if self.indexer is not None:
            self.indexer.indexer_position_ids = positions

    @property
    def is_recording(self) -> bool:
        return any(part.is_recording for part in self.parts)

    def set_recording(self, on: bool) -> None:
        for part in self.parts:
            part.set_recording(on)

    def record_last(self) -> None:
        for part in self.parts:
            part.record_last()

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.attention.view()

    @property
    def num_tokens(self) -> int:
        return self.attention.num_tokens

    @property
    def num_stored(self) -> int:
        return self.attention.num_stored

    @property
    def length_at_hand(self) -> int | None:
        return self.attention.length_at_hand

    def traced_length(self) -> int | torch.Tensor:
        return self.attention.traced_length()

    @property
    def max_length(self) -> int:
        return self.attention.max_length

    @property
    def is_croppable(self) -> bool:
        return all(part.is_croppable for part in self.parts)

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return self.attention.mask_sizes(num_new)

    def can_crop(self, num_tokens: int) -> bool:
        return all(part.can_crop(num_tokens) for part in self.parts)

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        for part in self.parts:
            if not part.can_crop(num_tokens):
                part.crop(num_tokens)  # raises with its own reason, before anything changed
        for part in self.parts:
            part.crop(num_tokens)

    def keep(self, indices: torch.Tensor) -> None:
        """Raises `UnsupportedVerb` where an indexer or a recurrent state stands beside."""
        for part in self.parts[1:]:
            part.keep(indices)
        self.attention.keep(indices)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    @property
    def batch_size(self) -> int:
        return max(part.batch_size for part in self.parts)

    def reorder(self, index: torch.Tensor) -> None:
        for part in self.parts:
            part.reorder(index)

    def select(self, index: torch.Tensor) -> None:
        for part in self.parts:
            part.select(index)

    def merge(self, others: Sequence["HybridLayer"]) -> "HybridLayer":
        if any(layer.kind != self.kind for layer in others):
            raise CacheError("Cannot merge a hybrid layer with another kind: other models.")
        layouts = {tuple(part.kind for part in layer.parts) for layer in (self, *others)}
        if len(layouts) > 1:
            raise CacheError(f"Cannot merge layers of {sorted(layouts)}: other models.")
        columns = zip(*(layer.parts for layer in (self, *others)), strict=True)
        return self._like([column[0].merge(column[1:]) for column in columns])

    def extract(self, row: int, num_padding: int = 0) -> "HybridLayer":
        return self._like([part.extract(row, num_padding) for part in self.parts])

    def fork(self) -> "HybridLayer":
        return self._like([part.fork() for part in self.parts])

    def state(self) -> LayerState:
        return LayerState(kind=self.kind, parts=tuple(part.state() for part in self.parts))

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        if len(state.parts) != len(self.parts):
            raise CacheError(
                f"A saved hybrid layer has {len(state.parts)} parts, this one {len(self.parts)}."
            )
        before = self._like([part.fork() for part in self.parts])
        try:
            for part, saved in zip(self.parts, state.parts, strict=True):
                part.load_state(saved)
        except CacheError:
            self.attention, self.recurrent = before.attention, before.recurrent
            self.indexer = before.indexer
            raise

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def nbytes_by_place(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for part in self.parts:
            for place, size in part.nbytes_by_place().items():
                total[place] = total.get(place, 0) + size
        return total

    @property
    def nbytes_reserved(self) -> int:
        return sum(part.nbytes_reserved for part in self.parts)
