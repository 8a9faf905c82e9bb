"""What the layers of a model that compresses its own cache share (DMC, DMS)."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.base import CacheLayer, LayerState, MaskSizes, row_index
from mnemon.layers.frozen_slots import FROZEN_NAMES, Codec, Frozen, FrozenPart, FrozenSlots
from mnemon.layers.ragged import RaggedSlots
from mnemon.layers.sliding import MAX_RECORDED
from mnemon.layers.tokens import check_mergeable
from mnemon.schemes import PackedFormat
from mnemon.types import Keys, NewKeys, NewValues, Values

__all__ = ["Call", "CompressingLayer", "Past"]


class Call(NamedTuple):
    """What one forward pass hands to a layer.

    Attributes:
        keys: at their positions, [batch, kv_heads, new, head_dim].
        values: [batch, kv_heads, new, value_dim].
        decisions: bool [batch, kv_heads, new]: the token merges into the slot before it (DMC), or
            the token before it is marked (DMS).
        valid: bool [batch, new]: no padding; None: all.
        raw: DMC: what later means are computed from, [batch, kv_heads, new, width].
    """

    keys: Tensor
    values: Tensor
    decisions: Tensor
    valid: Tensor | None = None
    raw: Tensor | None = None


class Past(NamedTuple):
    """Some of the slots that were there before new queries, which may read them.

    Attributes:
        keys: [batch, kv_heads, slots, head_dim].
        values: [batch, kv_heads, slots, value_dim].
        seen: bool [batch, kv_heads, new or 1, slots].
    """

    keys: Tensor
    values: Tensor
    seen: Tensor


class _Recorded(NamedTuple):
    call: Call
    before: dict[str, Any]


class CompressingLayer(CacheLayer):
    """Slots whose number the model decides, head by head; see `RaggedSlots`.

    Logical tokens count padding, stored ones do not: padding never takes a slot. `mask_sizes`
    speaks of logical tokens, because the model's attention masks for itself. `crop` takes back what
    was appended since `set_recording(True)` or the last `crop` (at most `MAX_RECORDED` tokens, or
    the last call if that is longer), and what nothing was decided about for good.
    `keep` raises `UnsupportedVerb`. `append` without decisions keeps every token; a layer that a
    retrofitted model's config asked for refuses it, as the model would compute something else.

    Args:
        sliding: tokens that a query sees at most, itself included; None for all.
        form: a packed format for slots that do not change any more; None for the model's dtype.
            They are packed 64 at a time, and never while calls are recorded.
        strict: refuse `append` without decisions.
        frozen: where such slots go; None: nowhere, or to the device in `form`.

    Raises:
        CacheError: a packed format and `sliding`.
    """

    method: ClassVar[str]
    #: Names of the tensors of a state besides slots and counts.
    _extra_names: ClassVar[frozenset[str]]

    def __init__(
        self,
        *,
        sliding: int | None = None,
        form: PackedFormat | None = None,
        strict: bool = False,
        frozen: Frozen | None = None,
    ) -> None:
        if sliding is not None and (form is not None or frozen is not None):
            raise CacheError(
                f"A layer that sees {sliding} tokens at most keeps them on the device in the "
                f"model's dtype: expected no packed format and no tier beside a sliding window."
            )
        self.sliding = sliding
        self.form = form
        self.strict = strict
        self.slots = RaggedSlots()
        if frozen is None and form is not None:
            frozen = FrozenSlots(Codec(form))
        self.frozen = frozen
        self._unfrozen = 0  # tokens since slots were frozen
        self._seen = 0
        self._count = torch.zeros(0, dtype=torch.int64)  # real tokens of every row
        self._started = False  # every row has a real token
        self._recording = False
        self._records_last = False
        self._recorded: list[_Recorded] = []

    # -- what a retrofitted model calls ------------------------------------------------------------

    def store(self, call: Call) -> None:
        """Take the tokens of one call in.

        Raises:
            CacheError: rows, heads or widths differ from what is stored.
        """
        call = self._fit(call)
        if self._recording or self._records_last:
            self._record(call)
        with torch.inference_mode(False), torch.no_grad():
            self._store(call)
            self._started = self._started or bool((self._count > 0).all())
        self._seen += call.keys.shape[2]
        self._unfrozen += call.keys.shape[2]
        self._freeze()

    @abstractmethod
    def _store(self, call: Call) -> None: ...

    def _like(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Tensors like the parts of a slot."""
        if self.sliding is None:
            return [keys, values]
        return [keys, values, keys[..., :1].to(torch.int32)]

    def _freeze(self) -> None:
        """Pack slots that do not change any more, if there may be blocks of them."""
        frozen = self.frozen
        if frozen is None or self._recorded or self._unfrozen < frozen.due():
            return
        self._unfrozen = 0
        with torch.inference_mode(False), torch.no_grad():
            start = self._first_frozen()
            held = self._num_held(0 if self.form is None else self.form.residual)
            free = self.slots.lengths.to(torch.int64) - start - held
            frozen.freeze(self.slots, start, free.clamp(min=0) // frozen.unit)

    @abstractmethod
    def _first_frozen(self) -> Tensor:
        """The first slot that can be frozen, int64 [batch, kv_heads]."""

    @abstractmethod
    def _num_held(self, residual: int) -> int:
        """Slots from there on that stay dense."""

    @abstractmethod
    def past(self, call: Call) -> list[Past]:
        """What the queries of `call`, which is not stored yet, see of the slots, in parts."""

    def frozen_past(self) -> Iterator[FrozenPart]:
        """What every query sees: the frozen slots. A part is valid until the next is asked for."""
        return iter(()) if self.frozen is None else self.frozen.parts()

    @abstractmethod
    def visible(self) -> Tensor | None:
        """Which slots the newest token sees, bool [batch, kv_heads, slots]; None: all live ones."""

    @property
    def counts(self) -> Tensor:
        """Tokens of every row without padding, int64 [batch]; empty before the first."""
        return self._count

    def unstarted(self) -> Tensor | None:
        """Rows that hold padding only so far, bool [batch]; None once every row holds a token."""
        return None if self._started or not self._count.numel() else self._count == 0

    def head_lengths(self) -> Tensor:
        """Slots of every row and head, int32 [batch, kv_heads]."""
        if self.frozen is None or self.frozen.is_empty:
            return self.slots.lengths
        return self.slots.lengths + self.frozen.lengths()

    # -- the contract ----------------------------------------------------------------------------

    def append(self, keys: NewKeys, values: NewValues) -> tuple[Keys, Values]:
        if self.strict:
            raise CacheError(
                f"This layer belongs to a model that was retrofitted with {self.method}, and its "
                f"attention said nothing about which tokens to keep: expected a model from "
                f"mnemon.memory.load_retrofitted(folder), got one that was loaded without it."
            )
        kept = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
        self.store(Call(keys, values, kept))
        view = self.view()
        assert view is not None
        return view

    def view(self) -> tuple[Keys, Values] | None:
        """A copy of the live slots in order of time, aligned at the newest, zeros on the left."""
        if self.slots.is_empty:
            return None
        order = self._order()  # [batch, heads, longest], -1 where there is none
        keys, values, *_ = self.slots.read(order.clamp(min=0))
        live = order >= 0
        if self.frozen is not None and not self.frozen.is_empty:
            resident = self.frozen.resident()
            old, total = resident.numbers(), resident.lengths()
            before = FrozenPart(old[0], old[1], total).live()
            live = torch.cat([before, live], dim=-1)
            keys, values = torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2)
            place = live.to(torch.int8).argsort(dim=-1, stable=True)
            place = place[..., place.shape[-1] - self.num_stored :]
            live = live.gather(2, place)
            keys, values = (
                x.gather(2, place[..., None].expand(*place.shape, x.shape[-1]))
                for x in (keys, values)
            )
        hidden = ~live[..., None]
        return keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)

    @abstractmethod
    def _order(self) -> Tensor:
        """Live slots in order of time, right-aligned, -1 on the left; [batch, heads, longest]."""

    @property
    def num_tokens(self) -> int:
        return self._seen

    @property
    def num_stored(self) -> int:
        """Slots of the head that keeps most."""
        if self.frozen is None or self.frozen.is_empty:
            return self.slots.longest()
        return int(self.head_lengths().max())

    @property
    def stored_as(self) -> str:
        return super().stored_as if self.form is None else self.form.name

    def mask_sizes(self, num_new: int) -> MaskSizes:
        return self._seen + num_new, 0

    # -- going back ------------------------------------------------------------------------------

    def can_crop(self, num_tokens: int) -> bool:
        if not 0 < num_tokens <= self._seen:
            return num_tokens == 0
        recorded = sum(one.call.keys.shape[2] for one in self._recorded)
        return num_tokens <= recorded or self._is_open(num_tokens)

    @abstractmethod
    def _is_open(self, num_tokens: int) -> bool:
        """Whether the newest `num_tokens` can go without a record of what was before."""

    @abstractmethod
    def _take_back(self, num_tokens: int) -> None:
        """Let them go (see `_is_open`)."""

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if not self.can_crop(num_tokens):
            raise CacheError(
                f"Cannot remove {num_tokens} of {self._seen} tokens: a {self.method} layer has "
                f"merged or dropped what came before them. Call activate_past_recording() before "
                f"appending what may be taken back, or reset() and prefill again."
            )
        if num_tokens:
            with torch.inference_mode(False), torch.no_grad():
                self._go_back(num_tokens)
        self._recorded.clear()
        self._freeze()

    def _go_back(self, num_tokens: int) -> None:
        recorded = sum(one.call.keys.shape[2] for one in self._recorded)
        if num_tokens > recorded:
            self._take_back(num_tokens)
            self._seen -= num_tokens
            return
        left = num_tokens
        while left > 0:
            call, before = self._recorded.pop()
            self._restore(before)
            num_new = call.keys.shape[2]
            if num_new > left:
                self._seen += num_new - left
                self._store(self._shortened(call, num_new - left))
            left -= num_new

    @staticmethod
    def _shortened(call: Call, count: int) -> Call:
        valid = None if call.valid is None else call.valid[:, :count]
        raw = None if call.raw is None else call.raw[:, :, :count]
        return Call(
            call.keys[:, :, :count],
            call.values[:, :, :count],
            call.decisions[:, :, :count],
            valid,
            raw,
        )

    def _record(self, call: Call) -> None:
        if self._records_last and not self._recording:
            self._recorded.clear()
        with torch.inference_mode(False), torch.no_grad():
            self._recorded.append(_Recorded(call, self._snapshot(call)))
        while len(self._recorded) > 1 and MAX_RECORDED < sum(
            one.call.keys.shape[2] for one in self._recorded
        ):
            del self._recorded[0]

    def _snapshot(self, call: Call) -> dict[str, Any]:
        """What `_restore` needs to be as before `call`."""
        return {
            "seen": self._seen,
            "started": self._started,
            "count": self._count.clone(),
            "lengths": self.slots.lengths.clone(),
        }

    def _restore(self, before: dict[str, Any]) -> None:
        self._seen = before["seen"]
        self._count = before["count"]
        if not self._seen:
            self.slots.clear()
            self._thaw()
            self._clear()
            self._started = False
            return
        self.slots.lengths = before["lengths"]
        self._started = before["started"]

    @abstractmethod
    def _clear(self) -> None:
        """Forget what is kept besides slots and counts."""

    def set_recording(self, on: bool) -> None:
        self._recording = on
        self._recorded.clear()

    def record_last(self) -> None:
        self._records_last = True

    @property
    def is_recording(self) -> bool:
        return self._recording

    def keep(self, indices: Tensor) -> None:
        raise UnsupportedVerb(f"A {self.method} layer's model decides what to keep: no keep().")

    def _thaw(self) -> None:
        if self.frozen is not None:
            self.frozen = self.frozen.holding(FrozenSlots(Codec(self.form)))
        self._unfrozen = 0

    def reset(self) -> None:
        self.slots.clear()
        self._thaw()
        self._seen = 0
        self._count = torch.zeros(0, dtype=torch.int64)
        self._started = False
        self._recording = False
        self._recorded.clear()
        self._clear()

    # -- rows ------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.slots.batch_size

    def reorder(self, index: Tensor) -> None:
        if self.slots.is_empty:
            return
        index = row_index(index, self.batch_size)
        with torch.inference_mode(False), torch.no_grad():
            self.slots.take_rows(index)
            if self.frozen is not None:
                self.frozen.take_rows(index)
            self._take_rows(index.to(self._count.device))
        self._recorded.clear()

    def _take_rows(self, index: Tensor) -> None:
        self._count = self._count.index_select(0, index)
        self._started = bool((self._count > 0).all())

    def select(self, index: Tensor) -> None:
        self.reorder(index)

    @abstractmethod
    def _empty(self) -> Self:
        """A new layer like this one, holding nothing."""

    def merge(self, others: Sequence[Self]) -> Self:
        layers = [self, *others]
        merged = self._empty()
        if check_mergeable(layers):
            if len({(layer.sliding, layer.form, layer._options()) for layer in layers}) > 1:
                raise CacheError(
                    f"Cannot merge {self.method} layers of different windows or formats."
                )
            with torch.inference_mode(False), torch.no_grad():
                merged.slots = RaggedSlots.stacked([layer.slots for layer in layers])
                held = [layer.frozen.resident() for layer in layers if layer.frozen is not None]
                if merged.frozen is not None and held:
                    heads = self.slots.lengths.shape[1]
                    shapes = [(layer.batch_size, heads) for layer in layers]
                    merged.frozen = merged.frozen.holding(FrozenSlots.stacked(held, shapes))
                merged._seen = max(layer._seen for layer in layers)
                merged._count = torch.cat([layer._count for layer in layers])
                merged._started = all(layer._started for layer in layers)
                merged._stack(layers)
        return merged

    @abstractmethod
    def _options(self) -> tuple[Any, ...]:
        """What two layers of one model have in common."""

    @abstractmethod
    def _stack(self, layers: Sequence[Self]) -> None:
        """Take over what is kept besides slots and counts."""

    def extract(self, row: int, num_padding: int = 0) -> Self:
        other = self._empty()
        if self.slots.is_empty:
            return other
        rows = row_index(torch.tensor([row]), self.batch_size)
        left = self._seen - num_padding
        source = self.fork()
        source.reorder(rows)
        excess = int(source._count[0]) - left
        if excess <= 0:
            source._seen = left
            return source
        # The padding was appended as tokens: without decisions nothing is merged or dropped.
        view = source.view()
        assert view is not None
        if not bool((source.head_lengths() == source._count[:, None]).all()):
            raise CacheError("Cannot remove padding: tokens were merged or dropped before.")
        keys, values = (part[:, :, excess:] for part in view)
        other.store(Call(keys, values, torch.zeros(keys.shape[:3], dtype=torch.bool)))
        return other

    def fork(self) -> Self:
        other = self._empty()
        # Outside inference mode, as everything that is written in place later.
        with torch.inference_mode(False), torch.no_grad():
            other.slots = self.slots.fork()
            if self.frozen is not None:
                other.frozen = self.frozen.fork()
            other._seen, other._count = self._seen, self._count.clone()
            other._copy(self)
        other._started, other._unfrozen = self._started, self._unfrozen
        other._recording, other._records_last = self._recording, self._records_last
        return other

    @abstractmethod
    def _copy(self, other: Self) -> None:
        """Take over what `other` keeps besides slots and counts."""

    # -- bytes -----------------------------------------------------------------------------------

    def state(self) -> LayerState:
        meta: dict[str, Any] = {"num_tokens": self._seen, "sliding": self.sliding}
        if self.slots.is_empty:
            return LayerState(kind=self.kind, meta=meta | self._all_facts())
        names = ("keys", "values", "positions")
        tensors = dict(zip(names, self.slots.packed(), strict=False))
        meta["num_padding"] = self._seen - int(self._count.max())
        tensors |= {"lengths": self.slots.lengths.clone(), "count": self._count.clone()}
        if self.frozen is not None:
            tensors |= self.frozen.resident().tensors()
        tensors |= self._extra()
        return LayerState(kind=self.kind, tensors=tensors, meta=meta | self._all_facts())

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """JSON-able settings that a state of another layer must share."""

    @abstractmethod
    def _extra(self) -> dict[str, Tensor]:
        """Tensors that are kept besides slots and counts."""

    @abstractmethod
    def _load_extra(self, tensors: dict[str, Tensor]) -> None:
        """Hold them."""

    def load_state(self, state: LayerState) -> None:
        self._check_state(state)
        expected = {"sliding": self.sliding} | self._all_facts()
        came = {name: state.meta.get(name) for name in expected}
        if came != expected:
            raise CacheError(
                f"A saved {self.method} layer has {came}, this one {expected}: the cache was made "
                f"for another model."
            )
        seen = int(state.meta["num_tokens"])
        tensors = dict(state.tensors)
        if not tensors:
            if seen:
                raise CacheError(f"A saved {self.method} layer saw {seen} tokens and holds none.")
            self.reset()
            return
        names = ["keys", "values"] + (["positions"] if self.sliding is not None else [])
        needed = {*names, "lengths", "count"}
        known = needed | self._extra_names
        if self.frozen is not None:
            known |= FROZEN_NAMES
        if not needed <= set(tensors) <= known:
            raise CacheError(f"A saved {self.method} layer has tensors {sorted(tensors)}.")
        lengths, count = tensors["lengths"], tensors["count"]
        if (
            lengths.ndim != 2
            or count.shape != lengths.shape[:1]
            or not count.numel()
            or bool((lengths < 0).any())
            or bool((lengths > count[:, None]).any())
            or int(count.max()) + int(state.meta["num_padding"]) != seen
            or int(state.meta["num_padding"]) < 0
        ):
            raise CacheError(f"A saved {self.method} layer's lengths contradict each other.")
        loaded = self._empty()
        with torch.inference_mode(False), torch.no_grad():
            loaded.slots.unpack(lengths, [tensors[name] for name in names])
            loaded._seen, loaded._count = seen, count.to(torch.int64).clone()
            loaded._started = bool((count > 0).all())
            if loaded.frozen is not None and "frozen" in tensors:
                resident = FrozenSlots(Codec(self.form))
                if not set(tensors) >= set(resident.codec.names):
                    raise CacheError(f"A saved {self.method} layer has tensors {sorted(tensors)}.")
                resident.load(tensors, loaded.slots.parts[0], loaded.slots.parts[1])
                loaded.frozen = loaded.frozen.holding(resident)
            other = needed | FROZEN_NAMES
            loaded._load_extra({name: x for name, x in tensors.items() if name not in other})
            self.reset()
            self.frozen = loaded.frozen
            self.slots, self._seen, self._count = loaded.slots, seen, loaded._count
            self._started = loaded._started
            self._copy(loaded)

    def _all_facts(self) -> dict[str, Any]:
        if self.form is None:
            return self._facts()
        return self._facts() | {"format": FrozenSlots(Codec(self.form)).facts()}

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_by_place().values())

    def nbytes_by_place(self) -> dict[str, int]:
        found = {"device": self.slots.nbytes + self._extra_bytes()}
        for place, size in ({} if self.frozen is None else self.frozen.nbytes_by_place()).items():
            found[place] = found.get(place, 0) + size
        return found

    @property
    def nbytes_reserved(self) -> int:
        frozen = 0 if self.frozen is None else self.frozen.nbytes_reserved
        return self.slots.nbytes_reserved + frozen + self._extra_bytes()

    def _extra_bytes(self) -> int:
        if not self._seen:
            return 0
        return sum(x.numel() * x.element_size() for x in self._extra().values())

    # -- helpers ---------------------------------------------------------------------------------

    def _fit(self, call: Call) -> Call:
        """`call` in the dtype that is held; one stored row serves a whole batch.

        Raises:
            CacheError: rows, heads or widths differ from what is stored.
        """
        keys, values = call.keys, call.values
        if keys.shape[:3] != values.shape[:3]:
            raise CacheError(
                f"Keys {list(keys.shape)} and values {list(values.shape)} do not belong together: "
                f"batch, heads and tokens must agree."
            )
        if self.slots.is_empty:
            if not self._count.numel():
                with torch.inference_mode(False):
                    self._count = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
            return call
        held = self.slots.parts
        if keys.shape[1] != held[0].shape[1] or (
            keys.shape[3] != held[0].shape[3] or values.shape[3] != held[1].shape[3]
        ):
            raise CacheError(
                f"The cache holds {list(held[0].shape)} [batch, heads, slots, width] and "
                f"{list(keys.shape)} came: another model's layer."
            )
        if self.batch_size != keys.shape[0]:
            if self.batch_size != 1:
                raise CacheError(
                    f"The cache holds {self.batch_size} rows and {keys.shape[0]} came. Only a "
                    f"cache of one row repeats itself; use cache.repeat(n) or cache.select(rows)."
                )
            self.repeat(keys.shape[0])
        for side, new in enumerate((keys, values)):
            if new.dtype is not self.slots.parts[side].dtype:
                self.slots.promote(side, new.dtype)
        dtypes = self.slots.parts[0].dtype, self.slots.parts[1].dtype
        return call._replace(keys=keys.to(dtypes[0]), values=values.to(dtypes[1]))
