"""Which axes of which tensors may change, which of them are one, and why we think so.

Some symbols are known by what a tensor is for:

    batch    rows                           query   new tokens of one call
    past     tokens in the cache            stored  tokens in a window, beside layers that keep all
    source   the encoder's tokens           total = past + query: the attention mask
    blocks   of 64 tokens in few bits       tail    tokens behind them (then total is
                                            64*blocks + tail + query)

Where all layers are windows, `past` is bounded and the mask may be longer than the sum: it also
covers what the windows have forgotten.

Samples confirm them, and say what the axes of other tensors are: an axis that differs between
samples is dynamic; axes that are equal in all samples are one; an axis that is the sum of two
others in all samples is that sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from mnemon.errors import ExportError

__all__ = ["Axis", "Ranges", "Shapes", "guess", "is_sum", "total_of"]

#: What a range may be given for: one size, or the least and the most (None: no bound).
Ranges = Mapping[str, int | tuple[int | None, int | None]]

_TOTAL = "total"


def is_sum(name: str) -> bool:
    """Whether an axis' name is a sum of symbols, as ``past + query`` is."""
    return "+" in name


def total_of(name: str, sizes: Mapping[str, int]) -> int | None:
    """What a sum such as ``64*blocks + tail + query`` comes to; None where a size is missing."""
    total = 0
    for term in name.split(" + "):
        factor, times, symbol = term.rpartition("*")
        if symbol not in sizes:
            return None
        total += (int(factor) if times else 1) * sizes[symbol]
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of one tensor.

    Args:
        tensor: the tensor's name.
        dim: which axis.
        name: the symbol of a dynamic axis, "past + query" for a sum; empty for a static one.
        role: what the axis is for, pinned or not; empty if unknown.
        size: of a static axis.
        low, high: bounds of a dynamic one; None: no bound.
        evidence: why.
    """

    tensor: str
    dim: int
    name: str = ""
    role: str = ""
    size: int | None = None
    low: int = 1
    high: int | None = None
    evidence: str = ""

    @property
    def is_dynamic(self) -> bool:
        """Whether the size may change between calls."""
        return self.size is None


@dataclass(frozen=True, slots=True)
class Shapes:
    """Every axis of every input of an exported model."""

    axes: tuple[Axis, ...]

    def of(self, tensor: str) -> list[Axis]:
        """The axes of one tensor, in order."""
        return [axis for axis in self.axes if axis.tensor == tensor]

    @property
    def symbols(self) -> dict[str, Axis]:
        """One axis for every symbol that is not a sum."""
        found: dict[str, Axis] = {}
        for axis in self.axes:
            if axis.is_dynamic and not is_sum(axis.name):
                found.setdefault(axis.name, axis)
        return found

    def bounded(self, highs: Mapping[str, int]) -> "Shapes":
        """The same with upper bounds that the model's code gave to symbols."""
        axes = []
        for axis in self.axes:
            most = highs.get(axis.name)
            if most is not None and (axis.high is None or most < axis.high):
                why = f"{axis.evidence}; at most {most} by the model's code"
                axis = replace(axis, high=most, evidence=why)
            axes.append(axis)
        return Shapes(tuple(axes))

    def summary(self) -> dict[str, tuple[str | int, ...]]:
        """Tensor name to its axes: a symbol or a size. Equal for equal guesses."""
        names = dict.fromkeys(axis.tensor for axis in self.axes)
        return {
            name: tuple(one.name if one.size is None else one.size for one in self.of(name))
            for name in names
        }

    def __str__(self) -> str:
        lines = []
        for tensor, axes in self.summary().items():
            free = [one.evidence for one in self.of(tensor) if one.is_dynamic]
            why = "; ".join(dict.fromkeys(free))
            lines.append(f"{tensor} [{', '.join(map(str, axes))}]  {why}")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-able facts."""
        return [asdict(axis) for axis in self.axes]

    @classmethod
    def from_json(cls, facts: Sequence[Mapping[str, Any]]) -> "Shapes":
        """The reverse of `to_json`."""
        return cls(tuple(Axis(**one) for one in facts))


@dataclass(frozen=True, slots=True)
class _Seen:
    """One axis, as the samples show it."""

    tensor: str
    dim: int
    role: str  # "" if unknown, else a symbol or "static"
    sizes: tuple[int | None, ...]  # per sample, None where it has no such tensor

    @property
    def shown(self) -> tuple[int, ...]:
        """The sizes that there are."""
        return tuple(size for size in self.sizes if size is not None)

    @property
    def label(self) -> str:
        return f"{self.tensor}[{self.dim}]"


def guess(
    roles: Mapping[str, Sequence[str | int]],
    samples: Sequence[Mapping[str, Sequence[int]]],
    ranges: Ranges | None = None,
    highs: Mapping[str, int] | None = None,
    total: str = "past + query",
) -> Shapes:
    """Names, joins and bounds of all axes.

    Args:
        roles: for every tensor whose meaning is known, a symbol (see above) or a size per axis.
        samples: shapes by tensor name, one mapping per sample.
        ranges: what the user pins or bounds, by symbol or as ``"tensor[dim]"``.
        highs: upper bounds that the model has (its window, its positions), by symbol.
        total: what an axis of the role "total" is the sum of.

    Raises:
        ExportError: samples that contradict a role, one another or a range; both sides are shown.
    """
    names = list(roles)
    for sample in samples:
        names += [name for name in sample if name not in names]
    seen: list[_Seen] = []
    for name in names:
        given = [tuple(sample[name]) if name in sample else None for sample in samples]
        shapes = [shape for shape in given if shape is not None]
        if len({len(shape) for shape in shapes}) > 1:
            raise ExportError(f"{name} has shapes {shapes} in the samples: one rank was expected.")
        known = roles.get(name)
        rank = len(known) if known is not None else len(shapes[0])
        if known is not None and shapes and len(shapes[0]) != rank:
            raise ExportError(
                f"{name} has shape {list(shapes[0])} in a sample; {rank} axes were expected: "
                f"{list(known)}."
            )
        for dim in range(rank):
            role = "" if known is None else known[dim]
            sizes = tuple(None if shape is None else shape[dim] for shape in given)
            if isinstance(role, int):
                if any(size not in (role, None) for size in sizes):
                    found = sorted({size for size in sizes if size is not None})
                    raise ExportError(
                        f"{name}[{dim}] is {found} in the samples and {role} in the "
                        f"model: another model's sample."
                    )
                seen.append(_Seen(name, dim, "static", (role,)))
            else:
                seen.append(_Seen(name, dim, role, sizes))
    values = _values(seen, highs or {}, total)
    axes = [_axis(one, values, len(samples), total) for one in seen]
    return _bounded(axes, seen, ranges or {}, highs or {})


def _values(
    seen: Sequence[_Seen], highs: Mapping[str, int], total: str
) -> dict[str, list[int | None]]:
    """What each symbol is in every sample; raises where two axes disagree."""
    values: dict[str, list[int | None]] = {}
    first: dict[str, _Seen] = {}
    for one in seen:
        if one.role in ("", "static") or not one.shown:
            continue
        held = values.setdefault(one.role, [None] * len(one.sizes))
        other = first.setdefault(one.role, one)
        for index, size in enumerate(one.sizes):
            if held[index] is None:
                held[index] = size
            elif size is not None and size != held[index]:
                raise ExportError(
                    f"{one.role!r} is {held[index]} in {other.label} and {size} in {one.label} "
                    f"(sample {index + 1}): both are the same axis, so the sample contradicts "
                    f"itself."
                )
    for number, size in enumerate(values.get(_TOTAL, ())):
        known = {name: sizes[number] for name, sizes in values.items() if name != _TOTAL}
        shown = {name: found for name, found in known.items() if found is not None}
        expected = total_of(total, shown)
        if size is None or expected is None or size == expected:
            continue
        if size > expected and "past" in highs and shown.get("past") == highs["past"]:
            continue  # windows have forgotten some
        terms = [term.rpartition("*") for term in total.split(" + ")]
        where = " + ".join(first[name].label for _, _, name in terms)
        counted = " + ".join(f"{factor}{times}{shown[name]}" for factor, times, name in terms)
        raise ExportError(
            f"{first[_TOTAL].label} is {size}; {total} = {counted} = {expected} ({where}). The "
            f"attention mask covers what is cached and what is new."
        )
    return values


def _listed(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else str(list(sizes))


def _axis(one: _Seen, values: dict[str, list[int | None]], num_samples: int, total: str) -> Axis:
    shown = f"; {_listed(one.shown)} in the samples" if len(set(one.shown)) > 1 else ""
    if one.role == "static":
        return Axis(tensor=one.tensor, dim=one.dim, size=one.sizes[0], evidence="of the model")
    if one.role:
        return Axis(
            tensor=one.tensor,
            dim=one.dim,
            name=total if one.role == _TOTAL else one.role,
            role=one.role,
            low=_least(one.role),
            evidence=f"{one.role} by role{shown}",
        )
    base = Axis(tensor=one.tensor, dim=one.dim)
    if len(set(one.shown)) < 2:
        why = "one sample shows one size" if num_samples < 2 else "the same in all samples"
        return replace(base, size=one.shown[0], evidence=f"no role, {why}")
    for name, sizes in values.items():
        if _agree(sizes, one.sizes):
            whole = total if name == _TOTAL else name
            why = f"equals {name} in all samples{shown}"
            return replace(base, name=whole, low=_least(name), evidence=why)
    plain = [(name, sizes) for name, sizes in values.items() if name != _TOTAL]
    for (left, a), (right, b) in combinations(plain, 2):
        pairs = zip(a, b, strict=True)
        if _agree([None if x is None or y is None else x + y for x, y in pairs], one.sizes):
            why = f"equals {left} + {right} in all samples{shown}"
            return replace(base, name=f"{left} + {right}", evidence=why)
    name = f"{one.tensor}_{one.dim}"
    values[name] = list(one.sizes)  # the next axis with these sizes is the same
    return replace(base, name=name, evidence=f"differs{shown}")


def _least(name: str) -> int:
    return 0 if name.startswith(("past", "stored", "blocks", "tail")) else 1


def _agree(sizes: Sequence[int | None], others: Sequence[int | None]) -> bool:
    """Whether two axes are equal wherever a sample has both, in two samples at least."""
    pairs = [(a, b) for a, b in zip(sizes, others, strict=True) if a is not None and b is not None]
    return len(set(pairs)) > 1 and all(a == b for a, b in pairs)


def _bounded(
    axes: list[Axis], seen: Sequence[_Seen], ranges: Ranges, highs: Mapping[str, int]
) -> Shapes:
    """With the bounds of the model and of the user."""
    labels = {f"{axis.tensor}[{axis.dim}]": axis for axis in axes}
    known = {axis.name for axis in axes if axis.is_dynamic}
    by_symbol: dict[str, int | tuple[int | None, int | None]] = {}
    for key, bound in ranges.items():
        symbol = key
        if key in labels:
            axis = labels[key]
            if not axis.is_dynamic:
                wanted = _pair(bound, key)
                if wanted != (axis.size, axis.size):
                    raise ExportError(
                        f"ranges says {key} is {bound}; it is {axis.size} ({axis.evidence})."
                    )
                continue
            symbol = axis.name
        if symbol == _TOTAL or is_sum(symbol):
            whole = next((axis.name for axis in axes if axis.role == _TOTAL), symbol)
            raise ExportError(f"ranges bounds {key!r}, which is {whole}: bound its terms instead.")
        if symbol not in known:
            names = ", ".join(sorted(name for name in known if not is_sum(name)))
            raise ExportError(
                f"ranges names {key!r}; known are {names} and axes such as {next(iter(labels))!r}."
            )
        if by_symbol.setdefault(symbol, bound) != bound:
            raise ExportError(f"ranges says {by_symbol[symbol]} and {bound} for {symbol!r}.")
    bounded = []
    for axis, one in zip(axes, seen, strict=True):
        new = axis
        if axis.is_dynamic and axis.name in highs:
            new = replace(new, high=highs[axis.name])
        if axis.is_dynamic and axis.name in by_symbol:
            new = _with_range(new, by_symbol[axis.name])
            _check_samples(new, one)
        bounded.append(new)
    return Shapes(tuple(bounded))


def _pair(bound: Any, label: str) -> tuple[int | None, int | None]:
    """A range as (least, most)."""
    several = isinstance(bound, tuple | list) and len(bound) == 2
    low, high = bound if several else (bound, bound)
    for one in (low, high):
        if (
            isinstance(one, bool)
            or not isinstance(one, int | None)
            or (one is None and not several)
        ):
            raise ExportError(
                f"ranges says {bound!r} for {label}: expected a size, or (least, most)."
            )
    return low, high


def _with_range(axis: Axis, bound: int | tuple[int | None, int | None]) -> Axis:
    label = f"{axis.tensor}[{axis.dim}] ({axis.name})"
    low, high = _pair(bound, label)
    least = axis.low if low is None else low
    most = axis.high if high is None else high
    if least < axis.low or (most is not None and most < least):
        raise ExportError(
            f"ranges says {bound} for {label}: expected a size, or (least, most) with least >= "
            f"{axis.low}."
        )
    if axis.high is not None and most is not None and most > axis.high:
        raise ExportError(
            f"ranges says up to {most} for {label}; the model itself goes up to {axis.high}."
        )
    if least == most:
        return replace(axis, size=least, name="", evidence=f"pinned to {least} by ranges")
    return replace(
        axis, low=least, high=most, evidence=f"{axis.evidence}; {least} to {most} by ranges"
    )


def _check_samples(axis: Axis, one: _Seen) -> None:
    low, high = (axis.size, axis.size) if axis.size is not None else (axis.low, axis.high)
    assert low is not None
    for size in one.shown:
        if size < low or (high is not None and size > high):
            allowed = f"{low}" if low == high else f"{low} to {high if high is not None else 'any'}"
            raise ExportError(
                f"{one.label} is {size} in a sample; ranges allows {allowed}. Change one of them."
            )
