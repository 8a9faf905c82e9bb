"""Keys of a sparse-attention indexer: one vector per token beside the keys and values."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import check_mergeable, make_fit, stack_right

__all__ = ["IndexerLayer"]


@final
class IndexerLayer(CacheLayer):
    """Indexer keys ``[batch, tokens, index_dim]`` and, for some models, their positions.

    A part of a composed layer (DeepSeek V3.2, GLM-5 and kin); keys and values raise
    `UnsupportedVerb`, all other verbs follow the attention beside it.

    Args:
        max_tokens: preallocate for so many tokens (compiled graphs); None grows.
    """

    kind = "indexer"
    counts_tokens = False

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.is_compileable = max_tokens is not None
        self._buffer = TokenBuffer() if max_tokens is None else StaticBuffer(max_tokens)
        #: Set by models with multi-dimensional positions, ``[position_dims, batch, tokens]``.
        self.indexer_position_ids: torch.Tensor | None = None

    def update_indexer(self, indexer_keys: torch.Tensor) -> torch.Tensor:
        """Append ``[batch, new, index_dim]``; returns what the indexer reads."""
        if not self._buffer.fits(indexer_keys):
            make_fit(self, (self._buffer, indexer_keys))
        return self._buffer.append(indexer_keys)

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        return self._buffer.view()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedVerb("An indexer keeps no keys and values: no append().")

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    @property
    def num_tokens(self) -> int:
        return len(self._buffer)

    @property
    def num_stored(self) -> int:
        return len(self._buffer)

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return self._buffer.reading_length(num_new), 0

    def can_crop(self, num_tokens: int) -> bool:
        if self._buffer.is_empty:  # its model has not used it: nothing to take back
            return num_tokens >= 0
        return 0 <= num_tokens <= len(self._buffer)

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens from an indexer of {len(self._buffer)}."
            )
        if num_tokens and not self._buffer.is_empty:
            self._buffer.crop(num_tokens)
            if self.indexer_position_ids is not None:
                self.indexer_position_ids = self.indexer_position_ids[..., :-num_tokens]

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb("An indexer scores every token the attention may read: no keep().")

    def reset(self) -> None:
        self._buffer.clear()
        self.indexer_position_ids = None

    @property
    def batch_size(self) -> int:
        return self._buffer.batch_size

    def reorder(self, index: torch.Tensor) -> None:
        self._buffer.gather_rows(index)
        positions = self.indexer_position_ids
        if positions is not None:
            self.indexer_position_ids = positions.index_select(1, index.to(positions.device))

    def select(self, index: torch.Tensor) -> None:
        if not self._buffer.is_empty:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence["IndexerLayer"]) -> "IndexerLayer":
        layers = [self, *others]
        merged = IndexerLayer(self.max_tokens)
        if check_mergeable(layers):
            longest = max(len(layer._buffer) for layer in layers)
            merged._buffer.replace(stack_right([layer._buffer.live() for layer in layers], longest))
            positions = [layer.indexer_position_ids for layer in layers]
            present = [one for one in positions if one is not None]
            if present:
                if len(present) < len(positions):
                    raise CacheError("Cannot merge indexers with positions and without.")
                pad = torch.nn.functional.pad
                merged.indexer_position_ids = torch.cat(
                    [pad(one, (longest - one.shape[-1], 0)) for one in present], dim=1
                )
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "IndexerLayer":
        other = IndexerLayer(self.max_tokens)
        live = self._buffer.live()
        if live is not None:
            rows = row_index(torch.tensor([row]), self.batch_size).to(live.device)
            other._buffer.replace(live.index_select(0, rows)[:, num_padding:])
            positions = self.indexer_position_ids
            if positions is not None:
                rows = rows.to(positions.device)
                other.indexer_position_ids = positions.index_select(1, rows)[..., num_padding:]
        return other

    def fork(self) -> "IndexerLayer":
        other = IndexerLayer(self.max_tokens)
        other._buffer = self._buffer.fork()
        other.indexer_position_ids = self.indexer_position_ids
        return other

    def state(self) -> LayerState:
        tensors = {}
        live = self._buffer.live()
        if live is not None:
            tensors["indexer_keys"] = live
        if self.indexer_position_ids is not None:
            tensors["indexer_position_ids"] = self.indexer_position_ids
        return LayerState(kind=self.kind, tensors=tensors)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        if set(state.tensors) - {"indexer_keys", "indexer_position_ids"}:
            raise CacheError(f"A saved indexer has tensors {sorted(state.tensors)}.")
        keys = state.tensors.get("indexer_keys")
        if keys is not None and keys.ndim != 3:
            raise CacheError(f"Saved indexer keys have shape {list(keys.shape)}; expected 3-D.")
        self.reset()
        if keys is not None:
            self._buffer.adopt(keys)
        self.indexer_position_ids = state.tensors.get("indexer_position_ids")

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + _nbytes(self.indexer_position_ids)

    @property
    def nbytes_reserved(self) -> int:
        return self._buffer.nbytes_reserved + _nbytes(self.indexer_position_ids)


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
