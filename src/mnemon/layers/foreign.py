"""A cache layer of a class that only one model of transformers knows."""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, final

import torch

from mnemon.errors import CacheError, CapacityError, UnsupportedVerb
from mnemon.hf.versions import current
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index

__all__ = ["ForeignLayer"]


@final
class ForeignLayer(CacheLayer):
    """Wraps a layer object of transformers (DeepSeek V4's compressors, MiniMax M3's sparse layers).

    The model reads and sets the wrapped object's own attributes through this one. Row verbs act
    on every tensor it holds; `crop` works where its class knows how to take back all it holds;
    `keep` and `merge` raise `UnsupportedVerb`.

    Args:
        make: makes an empty wrapped layer.
        max_tokens: its room, if it is preallocated and written in place.
    """

    kind = "foreign"

    def __init__(self, make: Callable[[], Any], max_tokens: int | None = None) -> None:
        self._make = make
        self._max_tokens = max_tokens
        self._inner = make()
        self.is_sliding = bool(getattr(self._inner, "is_sliding", False))
        # Of a cache that says no here, transformers takes every key for a real one.
        self.is_compileable = max_tokens is not None and bool(self._inner.is_compileable)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling():
            self._check_append(keys, values)
        result: tuple[torch.Tensor, torch.Tensor] = self._inner.update(keys, values)
        return result

    def _check_append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        held = self.view()
        rows = self.batch_size
        fits = keys.shape[:-1] == values.shape[:-1]
        if held is not None and held[0].ndim == 4:  # lazily made tensors are flat and empty
            for old, new in zip(held, (keys, values), strict=True):
                fits = fits and old.shape[1] == new.shape[1] and old.shape[3] == new.shape[3]
        if not fits or rows not in (-1, 1, keys.shape[0]):
            shapes = "nothing" if held is None else [list(one.shape) for one in held]
            raise CacheError(
                f"A {type(self._inner).__name__} holds {shapes} and keys {list(keys.shape)}, "
                f"values {list(values.shape)} came: another batch, or another model's layer."
            )
        if self._max_tokens is not None and self.num_tokens + keys.shape[2] > self._max_tokens:
            raise CapacityError(
                f"A static cache of {self._max_tokens} tokens holds {self.num_tokens} and "
                f"{keys.shape[2]} more came. Use a larger static(n), or the default recipe, which "
                f"grows."
            )
        if rows == 1 and keys.shape[0] != 1:
            self.repeat(keys.shape[0])

    def update_indexer(self, indexer_keys: torch.Tensor) -> torch.Tensor:
        if not hasattr(self._inner, "update_indexer"):
            return super().update_indexer(indexer_keys)
        result: torch.Tensor = self._inner.update_indexer(indexer_keys)
        return result

    def view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._inner.keys is None:
            return None
        return self._inner.keys, self._inner.values

    @property
    def num_tokens(self) -> int:
        return int(self._inner.get_seq_length())

    @property
    def length_at_hand(self) -> int | None:
        return None if self._max_tokens is not None else self.num_tokens

    def traced_length(self) -> int | torch.Tensor:
        if self._max_tokens is not None and torch.compiler.is_compiling():
            length: torch.Tensor = self._inner.get_seq_length()
            return length
        return self.num_tokens

    @property
    def num_stored(self) -> int:
        keys = self._inner.keys
        held = 0 if keys is None or keys.ndim < 4 else int(keys.shape[-2])
        return held if self._max_tokens is None else min(held, self.num_tokens)

    @property
    def max_length(self) -> int:
        return int(self._inner.get_max_length())

    def mask_sizes(self, num_new: int) -> MaskSizes:
        length, offset = self._inner.get_mask_sizes(num_new)
        return int(length), int(offset)

    @property
    def is_croppable(self) -> bool:
        # A class that adds state but inherits crop would take back the keys only.
        own = vars(type(self._inner))
        return "__init__" not in own or "crop" in own

    def can_crop(self, num_tokens: int) -> bool:
        if num_tokens == 0:
            return True
        return self.is_croppable and 0 <= num_tokens <= self.num_tokens

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} tokens from a {type(self._inner).__name__}: it cannot "
                f"take back its compressed state. fork() before, or reset() and prefill again."
            )
        if num_tokens:
            try:
                current.crop_layer(self._inner, num_tokens)
            except (RuntimeError, ValueError) as error:
                raise CacheError(str(error)) from error

    def set_recording(self, on: bool) -> None:
        if hasattr(self._inner, "record_past"):
            self._inner.record_past = on

    @property
    def is_recording(self) -> bool:
        return bool(getattr(self._inner, "record_past", False))

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb(f"A {type(self._inner).__name__} has no keep().")

    def reset(self) -> None:
        self._inner = self._make()

    @property
    def batch_size(self) -> int:
        for _, _, tensor in _tensors(self._inner.__dict__):
            if tensor.ndim > 1:
                return int(tensor.shape[0])
        return -1

    def reorder(self, index: torch.Tensor) -> None:
        batch_size = self.batch_size
        moved: dict[int, torch.Tensor] = {}
        for holder, name, tensor in list(_tensors(self._inner.__dict__)):
            if tensor.ndim > 1 and tensor.shape[0] == batch_size:
                if id(tensor) not in moved:  # two names for one tensor stay one
                    moved[id(tensor)] = tensor.index_select(0, index.to(tensor.device))
                holder[name] = moved[id(tensor)]

    def select(self, index: torch.Tensor) -> None:
        if self.batch_size > 0:
            self.reorder(row_index(index, self.batch_size))

    def merge(self, others: Sequence["ForeignLayer"]) -> "ForeignLayer":
        raise UnsupportedVerb(f"Layers of class {type(self._inner).__name__} cannot be merged.")

    def extract(self, row: int, num_padding: int = 0) -> "ForeignLayer":
        if num_padding:
            raise UnsupportedVerb(
                f"A {type(self._inner).__name__} cannot remove the padding of a row."
            )
        other = self.fork()
        other.select(torch.tensor([row]))
        return other

    def fork(self) -> "ForeignLayer":
        other = ForeignLayer(self._make, self._max_tokens)
        memo: dict[int, Any] = {}
        if self._max_tokens is None:
            # Classes that grow concatenate and never write in place: sharing tensors is safe.
            memo = {id(tensor): tensor for _, _, tensor in _tensors(self._inner.__dict__)}
        other._inner = copy.deepcopy(self._inner, memo)
        return other

    def state(self) -> LayerState:
        tensors: dict[str, torch.Tensor] = {}
        meta: dict[str, Any] = {}
        for name, value in self._inner.__dict__.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, dict):
                for key, entry in value.items():
                    if isinstance(entry, torch.Tensor):
                        tensors[f"{name}.{key}"] = entry
                    elif isinstance(entry, bool | int):
                        meta[f"{name}.{key}"] = entry
            elif isinstance(value, bool | int):
                meta[name] = value
        meta["class"] = type(self._inner).__name__
        return LayerState(kind=self.kind, tensors=tensors, meta=meta)

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        if state.meta.get("class") != type(self._inner).__name__:
            raise CacheError(
                f"A saved layer of class {state.meta.get('class')!r} does not fit a "
                f"{type(self._inner).__name__}."
            )
        inner = self._make()
        fields = inner.__dict__
        for path, value in [*state.tensors.items(), *state.meta.items()]:
            name, _, key = path.partition(".")
            if path == "class":
                continue
            if name not in fields or (key and not isinstance(fields[name], dict)):
                raise CacheError(f"A saved {state.meta['class']} has an unknown field {path!r}.")
            if self._max_tokens is not None and isinstance(value, torch.Tensor):
                value = value.clone()  # written in place: never into a file's mapping
            if key:
                fields[name][key] = value
            else:
                fields[name] = value
        keys = fields.get("keys")
        if keys is not None:
            fields["dtype"], fields["device"] = keys.dtype, keys.device
        self._inner = inner

    @property
    def nbytes(self) -> int:
        unique = {id(tensor): tensor for _, _, tensor in _tensors(self._inner.__dict__)}
        return sum(t.numel() * t.element_size() for t in unique.values() if t.ndim > 1)

    @property
    def nbytes_reserved(self) -> int:
        return self.nbytes


def _tensors(
    fields: MutableMapping[str, Any],
) -> Iterator[tuple[MutableMapping[str, Any], str, torch.Tensor]]:
    """Every tensor in `fields` and in the dicts it holds, with where it stands."""
    for name, value in list(fields.items()):
        if isinstance(value, torch.Tensor):
            yield fields, name, value
        elif isinstance(value, dict):
            yield from _tensors(value)
