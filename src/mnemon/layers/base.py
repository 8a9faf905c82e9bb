"""The contract of a cache layer: what one model layer keeps between two forward passes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["CacheLayer", "LayerState", "MaskSizes"]

MaskSizes = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """Everything a layer holds, as opaque tensors and JSON-able facts.

    Args:
        kind: the layer's `CacheLayer.kind`.
        tensors: named tensors; may share memory with the layer. A mapping that loads or verifies
            on access is fine.
        meta: JSON-able facts (lengths, window).
        parts: states of the parts of a composed layer, in order.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple["LayerState", ...] = ()


class CacheLayer(ABC):
    """What one model layer keeps. Every verb works, or raises a documented `CacheError`.

    Shapes: keys ``[batch, kv_heads, tokens, head_dim]``, values ``[..., value_dim]``. Lengths are
    int snapshots. *Logical* tokens were seen; *stored* tokens are kept.
    """

    kind: str
    #: The layer forgets by design: it keeps a bounded number of recent tokens.
    is_sliding: bool = False
    #: The layer keeps a recurrent or convolution state instead of tokens.
    is_linear: bool = False
    #: The layer keeps nothing (it shares another layer's, or has no attention).
    is_dummy: bool = False
    #: The layer can live inside a compiled graph (static addresses, no Python lengths).
    is_compileable: bool = False
    #: Whether `num_tokens` means anything.
    counts_tokens: bool = True
    #: All it keeps is one pair of keys and values, `dense_pair()`; `load_state` takes such a pair.
    is_pair: bool = False

    # -- keys and values -----------------------------------------------------------------------

    @abstractmethod
    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        """Store ``[batch, kv_heads, new, head_dim]`` and return what attention reads.

        A batch of n rows that meets one stored row repeats the stored row.

        Raises:
            CapacityError: a preallocated layer is full.
            CacheError: batch, heads or width differ from what is stored.
            UnsupportedVerb: the layer keeps no keys and values.
        """

    @abstractmethod
    def view(self) -> tuple[Keys, Values] | None:
        """Stored keys and values as attention would read them; None while empty."""

    def dense_pair(self) -> tuple[Keys, Values]:
        """All stored keys and values in the model's dtype, of a layer that holds some.

        Raises:
            UnsupportedVerb: the layer keeps something else (see `is_pair`).
        """
        if not self.is_pair:
            raise UnsupportedVerb(f"A {self.kind} layer keeps more than one pair of tensors.")
        held = self.state().tensors
        return held["keys"], held["values"]

    @property
    def stored_as(self) -> str:
        """The format of the stored numbers for reports: a dtype or a packed format; or empty."""
        keys = self.keys
        return "" if keys is None else str(keys.dtype).removeprefix("torch.")

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens seen (logical length)."""

    @property
    @abstractmethod
    def num_stored(self) -> int:
        """Tokens kept."""

    def traced_length(self) -> int | torch.Tensor:
        """`num_tokens`, or the counter on the device while a graph is being compiled."""
        return self.num_tokens

    @property
    def length_at_hand(self) -> int | None:
        """`num_tokens`, or None where asking would wait for a device."""
        return self.num_tokens

    @property
    def max_length(self) -> int:
        """Tokens the layer can hold; -1 without a bound."""
        return -1

    @abstractmethod
    def mask_sizes(self, num_new: int) -> MaskSizes:
        """``(kv_length, kv_offset)`` of what the next `append` of `num_new` tokens returns."""

    # -- going back, forgetting ------------------------------------------------------------------

    @abstractmethod
    def can_crop(self, num_tokens: int) -> bool:
        """Whether the newest `num_tokens` can be taken back leaving no trace."""

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Take back the newest `num_tokens` (>= 0); 0 commits what was recorded for going back.

        Raises:
            CacheError: what came before is no longer there (see `can_crop`).
        """

    def set_recording(self, on: bool) -> None:  # noqa: B027  (a no-op is right for most layers)
        """Keep what a later `crop` needs (assisted decoding), bounded; no-op for most layers."""

    def record_last(self) -> None:  # noqa: B027  (as above)
        """From now on keep what taking back the last append needs; no-op for most layers.

        For releases of transformers that do not announce assisted decoding.
        """

    @property
    def is_initialized(self) -> bool:
        """What transformers' models read to learn whether the layer was ever written (mllama)."""
        return self.batch_size > 0

    @property
    def record_past(self) -> bool:
        """What transformers reads, and sets to False when assisted decoding ends."""
        return self.is_recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.set_recording(on)

    @property
    def is_croppable(self) -> bool:
        """Whether assisted decoding can take tokens back (after `set_recording`)."""
        return True

    @abstractmethod
    def keep(self, indices: torch.Tensor) -> None:
        """Keep only the stored tokens at `indices` (int64, ascending, ``[kept]`` or
        ``[batch, kv_heads, kept]``); the logical length does not change.

        Raises:
            UnsupportedVerb: the layer's positions are bound to its mask (window, static, state).
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    # -- rows ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Rows held; -1 while empty."""

    @abstractmethod
    def reorder(self, index: torch.Tensor) -> None:
        """Row i becomes what row ``index[i]`` was (beam search)."""

    def repeat(self, repeats: int) -> None:
        """Each row `repeats` times, neighbours together (``repeat_interleave``)."""
        if self.batch_size > 0:
            rows = torch.arange(self.batch_size).repeat_interleave(repeats)
            self.select(rows)

    @abstractmethod
    def select(self, index: torch.Tensor) -> None:
        """Keep the rows at `index`, in that order (int64 or bool)."""

    @abstractmethod
    def merge(self, others: Sequence[Self]) -> Self:
        """A new layer with the rows of self and `others`, aligned at their newest token.

        Shorter ones are padded with zeros on the left; the caller masks the padding.

        Raises:
            CacheError: layers that cannot stand in one batch.
        """

    @abstractmethod
    def extract(self, row: int, num_padding: int = 0) -> Self:
        """A new layer with row `row` alone, without its first `num_padding` logical tokens."""

    @abstractmethod
    def fork(self) -> Self:
        """An independent layer with the same content; memory is copied when one of them writes."""

    # -- bytes -----------------------------------------------------------------------------------

    @abstractmethod
    def state(self) -> LayerState:
        """All content. Tensors may share memory with the layer."""

    @abstractmethod
    def load_state(self, state: LayerState) -> None:
        """Hold the content of `state`; the inverse of `state`. Tensors are borrowed, not copied.

        Raises:
            CacheError: a state of another kind of layer, or one that contradicts itself.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes stored."""

    @property
    @abstractmethod
    def nbytes_reserved(self) -> int:
        """Bytes allocated."""

    def nbytes_by_place(self) -> dict[str, int]:
        """`nbytes` by where they lie: ``"device"``, ``"host"``, ``"disk"``."""
        return {"device": self.nbytes}

    # -- recurrent states and sparse indices: most layers have none ------------------------------

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no convolution state.")

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0
    ) -> torch.Tensor:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no recurrent state.")

    def conv_state(self, state_idx: int = 0) -> torch.Tensor | None:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no convolution state.")

    def recurrent_state(self, state_idx: int = 0) -> torch.Tensor | None:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no recurrent state.")

    def has_state(self, state_idx: int | None = None) -> bool:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no recurrent state.")

    def update_indexer(self, indexer_keys: torch.Tensor) -> torch.Tensor:
        raise UnsupportedVerb(f"A {self.kind} layer keeps no indexer keys.")

    @property
    def is_recording(self) -> bool:
        return False

    # -- what model code reads from a layer ------------------------------------------------------

    @property
    def conv_states(self) -> Mapping[int, torch.Tensor | None]:
        """Convolution states by number (models of transformers up to 5.21 read them here)."""
        raise UnsupportedVerb(f"A {self.kind} layer keeps no convolution state.")

    @property
    def recurrent_states(self) -> Mapping[int, torch.Tensor | None]:
        """Recurrent states by number (models of transformers up to 5.21 read them here)."""
        raise UnsupportedVerb(f"A {self.kind} layer keeps no recurrent state.")

    @property
    def keys(self) -> torch.Tensor | None:
        view = self.view()
        return None if view is None else view[0]

    @property
    def values(self) -> torch.Tensor | None:
        view = self.view()
        return None if view is None else view[1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tokens={self.num_tokens}, num_stored={self.num_stored})"

    # -- helpers for implementations -------------------------------------------------------------

    def _check_state(self, state: LayerState) -> None:
        if state.kind != self.kind:
            raise CacheError(
                f"This layer is of kind {self.kind!r}, the saved state of kind {state.kind!r}: the "
                f"cache was made for another model or recipe."
            )

    def _check_count(self, num_tokens: int) -> None:
        if num_tokens < 0:
            raise CacheError(f"crop takes a number of tokens to remove, >= 0; got {num_tokens}.")


def row_index(index: torch.Tensor, batch_size: int) -> torch.Tensor:
    """`index` as int64 row numbers >= 0; -1 is the last row, a bool mask names rows to keep.

    Raises:
        CacheError: not one-dimensional, or out of range.
    """
    index = torch.as_tensor(index)
    if index.ndim != 1 or index.is_floating_point():
        raise CacheError(
            f"Rows are given as a 1-D tensor of int or bool; got {index.dtype} {list(index.shape)}."
        )
    if index.dtype == torch.bool:
        if index.shape[0] != batch_size:
            raise CacheError(f"A mask of {index.shape[0]} rows came; the cache has {batch_size}.")
        return index.nonzero().squeeze(-1)
    # Asking for the extremes of a tensor on an accelerator would stop the host.
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -batch_size or high >= batch_size:
            raise CacheError(
                f"Row {low if low < -batch_size else high} asked for; the cache has {batch_size}."
            )
        if low >= 0:
            return index.to(torch.int64)
    return index.to(torch.int64).remainder(max(batch_size, 1))
