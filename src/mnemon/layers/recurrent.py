"""Recurrent and convolution states: Mamba, gated linear attention, short convolutions."""

from collections.abc import Mapping, Sequence
from typing import final

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.tokens import check_mergeable

__all__ = ["RecurrentLayer"]

#: Convolution columns that recording keeps besides the kernel, when nobody calls `crop`.
MAX_RECORDED = 1024


@final
class RecurrentLayer(CacheLayer):
    """States that summarise all tokens seen; any number of (convolution, recurrent) pairs.

    Convolution states ``[batch, channels, kernel]``, recurrent states ``[batch, ...]``. A state
    cannot be run backwards: `crop` works for convolution states while recording, and raises
    `CacheError` as soon as there is a recurrent state. Keys and values raise `UnsupportedVerb`.

    Args:
        num_states: pairs of states.
    """

    kind = "recurrent"
    is_linear = True
    is_compileable = True
    counts_tokens = False

    def __init__(self, num_states: int = 1) -> None:
        self.num_states = num_states
        self._conv: dict[int, torch.Tensor] = {}
        self._kernel: dict[int, int] = {}
        self._recurrent: dict[int, torch.Tensor] = {}
        self._has_state = dict.fromkeys(range(num_states), False)
        self._cut: set[int] = set()  # convolution states that older columns were cut from
        self._recording = False

    # -- states ----------------------------------------------------------------------------------

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Add ``[batch, channels, new]`` columns; returns past and new ones for the convolution."""
        if state_idx not in self._kernel:
            self._kernel[state_idx] = conv_kernel_size or conv_states.shape[-1]
        kernel = self._kernel[state_idx]
        if self._has_state[state_idx]:
            past = self._rows_for(self._conv, state_idx, conv_states, slice(1, -1))
            columns = torch.cat([past, conv_states], dim=-1)
        else:
            columns = conv_states
            if not self._recording and columns.shape[-1] < kernel:
                columns = torch.nn.functional.pad(columns, (kernel - columns.shape[-1], 0))
        self._has_state[state_idx] = True
        kept = kernel
        if self._recording:
            kept += max(MAX_RECORDED, conv_states.shape[-1])
        if columns.shape[-1] > kept:
            self._cut.add(state_idx)
        if self._recording:
            self._conv[state_idx] = columns[..., -kept:]
        else:
            self._store(self._conv, state_idx, columns[..., -kept:])
        return columns

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0
    ) -> torch.Tensor:
        """Replace the recurrent state ``[batch, ...]``."""
        if state_idx in self._recurrent:
            self._rows_for(self._recurrent, state_idx, recurrent_states, slice(1, None))
        self._store(self._recurrent, state_idx, recurrent_states)
        return self._recurrent[state_idx]

    def _store(self, states: dict[int, torch.Tensor], state_idx: int, new: torch.Tensor) -> None:
        """In place where possible, so that a compiled graph sees one address."""
        old = states.get(state_idx)
        reusable = (
            old is not None
            and old.shape == new.shape
            and old.dtype == new.dtype
            and not (torch.is_grad_enabled() and (new.requires_grad or old.requires_grad))
            and not (old.is_inference() and not torch.is_inference_mode_enabled())
        )
        if reusable and old is not None:
            old.copy_(new)
        elif torch.is_grad_enabled() and new.requires_grad:
            states[state_idx] = new
        else:
            with torch.inference_mode(False):
                fresh = torch.empty_like(new, memory_format=torch.contiguous_format)
            states[state_idx] = fresh.copy_(new)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(states[state_idx])

    def _rows_for(
        self, states: dict[int, torch.Tensor], state_idx: int, new: torch.Tensor, fixed: slice
    ) -> torch.Tensor:
        """The state that `new` follows; one row serves a whole batch. `fixed` dimensions agree."""
        old = states[state_idx]
        if old.shape[fixed] != new.shape[fixed] or old.shape[0] not in (1, new.shape[0]):
            raise CacheError(
                f"The layer holds a state {list(old.shape)} and {list(new.shape)} came: another "
                f"batch, or another model's layer. Only a cache of one row repeats itself."
            )
        if old.shape[0] != new.shape[0]:
            self.repeat(new.shape[0])
        return states[state_idx]

    def conv_state(self, state_idx: int = 0) -> torch.Tensor | None:
        return self._conv.get(state_idx) if self._has_state[state_idx] else None

    def recurrent_state(self, state_idx: int = 0) -> torch.Tensor | None:
        return self._recurrent.get(state_idx) if self._has_state[state_idx] else None

    @property
    def device(self) -> torch.device | None:
        """Where the states are; None while there are none."""
        states = [*self._conv.values(), *self._recurrent.values()]
        return states[0].device if states else None

    @property
    def conv_states(self) -> Mapping[int, torch.Tensor | None]:
        return {index: self.conv_state(index) for index in range(self.num_states)}

    @property
    def recurrent_states(self) -> Mapping[int, torch.Tensor | None]:
        return {index: self.recurrent_state(index) for index in range(self.num_states)}

    def has_state(self, state_idx: int | None = None) -> bool:
        if state_idx is None:
            return all(self._has_state.values())
        return self._has_state[state_idx]

    @property
    def is_recording(self) -> bool:
        return self._recording

    def set_recording(self, on: bool) -> None:
        self._recording = on
        if not on:
            self._commit()

    # -- the contract ----------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise UnsupportedVerb("A recurrent layer keeps states, not keys and values: no append().")

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
        if num_tokens <= 0 or not any(self._has_state.values()):
            return num_tokens >= 0
        if self._recurrent or not self._recording:
            return False
        # Where nothing was cut, what lies before the first column is zeros.
        return all(
            conv.shape[-1] - num_tokens >= (self._kernel[key] if key in self._cut else 0)
            for key, conv in self._conv.items()
        )

    @property
    def is_croppable(self) -> bool:
        """Convolution states only; unknown, hence False, before the first update."""
        return bool(self._conv) and not self._recurrent

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            why = "a recurrent state summarises all tokens"
            if not self._recurrent:
                why = "older convolution columns are gone (see activate_past_recording)"
            raise CacheError(
                f"Cannot remove {num_tokens} tokens from a recurrent layer: {why}. fork() before "
                f"what may have to be taken back, or reset() and prefill again."
            )
        if num_tokens and self._recording:
            for state_idx, conv in self._conv.items():
                self._conv[state_idx] = conv[..., : conv.shape[-1] - num_tokens]
        self._commit()

    def _commit(self) -> None:
        for state_idx, conv in self._conv.items():
            kernel = self._kernel[state_idx]
            if conv.shape[-1] > kernel:
                self._cut.add(state_idx)
                self._conv[state_idx] = conv[..., -kernel:].contiguous()
            elif conv.shape[-1] < kernel:
                missing = kernel - conv.shape[-1]
                self._conv[state_idx] = torch.nn.functional.pad(conv, (missing, 0))

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb("A recurrent layer keeps a state, not tokens: no keep().")

    def reset(self) -> None:
        self._conv.clear()
        self._recurrent.clear()
        self._kernel.clear()
        self._cut.clear()
        self._has_state = dict.fromkeys(range(self.num_states), False)
        self._recording = False

    @property
    def batch_size(self) -> int:
        for states in (self._conv, self._recurrent):
            for state in states.values():
                return int(state.shape[0])
        return -1

    def reorder(self, index: torch.Tensor) -> None:
        for states in (self._conv, self._recurrent):
            for state_idx, state in states.items():
                states[state_idx] = state.index_select(0, index.to(state.device))

    def select(self, index: torch.Tensor) -> None:
        if self.batch_size > 0:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence["RecurrentLayer"]) -> "RecurrentLayer":
        layers = [self, *others]
        merged = RecurrentLayer(self.num_states)
        if check_mergeable(layers):
            facts = [
                (one._has_state, one._kernel, one._conv.keys(), one._recurrent.keys())
                for one in layers
            ]
            if any(fact != facts[0] for fact in facts):
                raise CacheError("Cannot merge recurrent layers that hold different states.")
            merged._has_state = dict(self._has_state)
            merged._kernel = dict(self._kernel)
            merged._cut = set(self._conv)
            for name in ("_conv", "_recurrent"):
                for state_idx in getattr(self, name):
                    parts = [getattr(layer, name)[state_idx] for layer in layers]
                    if len({(part.shape[1:], part.dtype, part.device) for part in parts}) > 1:
                        raise CacheError(
                            f"Cannot merge states "
                            f"{[f'{part.dtype} {list(part.shape)}' for part in parts]}: other "
                            f"models or devices, or recording is on in some of them."
                        )
                    getattr(merged, name)[state_idx] = torch.cat(parts)
        return merged

    def extract(self, row: int, num_padding: int = 0) -> "RecurrentLayer":
        """Row `row`; padding was masked when the state was made, so there is nothing to cut."""
        other = self.fork()
        other.select(torch.tensor([row]))
        return other

    def fork(self) -> "RecurrentLayer":
        other = RecurrentLayer(self.num_states)
        other._conv = {key: state.clone() for key, state in self._conv.items()}
        other._recurrent = {key: state.clone() for key, state in self._recurrent.items()}
        other._kernel = dict(self._kernel)
        other._cut = set(self._cut)
        other._has_state = dict(self._has_state)
        other._recording = self._recording
        return other

    def state(self) -> LayerState:
        tensors = {f"conv.{key}": state for key, state in self._conv.items()}
        tensors |= {f"recurrent.{key}": state for key, state in self._recurrent.items()}
        meta = {
            "num_states": self.num_states,
            "kernel": {str(key): size for key, size in self._kernel.items()},
            "has_state": [self._has_state[key] for key in range(self.num_states)],
        }
        return LayerState(kind=self.kind, tensors=tensors, meta=meta)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        flags = list(state.meta["has_state"])
        if int(state.meta["num_states"]) != self.num_states or len(flags) != self.num_states:
            raise CacheError(
                f"A saved recurrent layer has {state.meta['num_states']} states, this one "
                f"{self.num_states}."
            )
        kernel = {int(key): int(size) for key, size in state.meta["kernel"].items()}
        saved: dict[str, dict[int, torch.Tensor]] = {"conv": {}, "recurrent": {}}
        for name, tensor in state.tensors.items():
            role, _, key = name.partition(".")
            known = role in saved and key.isdecimal() and int(key) < self.num_states
            if not known or tensor.ndim < 2 or (role == "conv" and int(key) not in kernel):
                raise CacheError(
                    f"A saved recurrent layer has a tensor {name!r} of shape {list(tensor.shape)}."
                )
            if role == "conv":
                tensor = tensor[..., -kernel[int(key)] :]
            # Copied: states are small and are written in place.
            saved[role][int(key)] = tensor.clone(memory_format=torch.contiguous_format)
        self.reset()
        self._conv, self._recurrent, self._kernel = saved["conv"], saved["recurrent"], kernel
        self._cut = set(self._conv)
        self._has_state = {key: bool(flag) for key, flag in enumerate(flags)}

    @property
    def nbytes(self) -> int:
        states = [*self._conv.values(), *self._recurrent.values()]
        return sum(state.numel() * state.element_size() for state in states)

    @property
    def nbytes_reserved(self) -> int:
        return self.nbytes
