"""From a model to traced graphs: the samples, the inflated inputs, the trace, and what it says."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemon.cache import Cache
from mnemon.errors import ExportError
from mnemon.export.axes import Axis, Ranges, Shapes, guess, is_sum, total_of
from mnemon.export.forms import CacheForm, form_of, part_names
from mnemon.export.graph import DecoderStep, EncoderStep
from mnemon.export.targets import PartInfo
from mnemon.hf.exporting import cache_argument, takes, traceable, untraceable_modules
from mnemon.recipe import Recipe

__all__ = ["Traced", "plan_shapes", "read_form", "trace"]

_SIZES = (3, 5, 7, 11, 13, 17, 19, 23)
_UNBOUNDED = 1 << 31  # torch's own bounds of sizes are beyond it
_KNOWN = frozenset(
    (
        "input_ids",
        "attention_mask",
        "past_key_values",
        "decoder_input_ids",
        "decoder_attention_mask",
    )
)


@dataclass(frozen=True, slots=True)
class Traced:
    """A part, traced.

    Args:
        info: its names.
        program: the graph.
        symbols: torch's name of a dimension to ours.
        highs: the most that a dimension can be, where the model's code bounds it.
    """

    info: PartInfo
    program: torch.export.ExportedProgram
    symbols: dict[str, str]
    highs: dict[str, int]


def read_form(model: PreTrainedModel, recipe: Recipe) -> CacheForm:
    """What the model's cache is in a graph, found by running one token through it.

    Args:
        model: of any architecture.
        recipe: how the graph is to keep its cache.

    Raises:
        ExportError: a model that cannot be traced, and why.
    """
    odd = untraceable_modules(model)
    if odd:
        raise ExportError(
            f"The model uses {', '.join(odd)}, which is no plain operator. Load it with "
            f'attn_implementation="sdpa".'
        )
    config = model.config
    cache = Cache(config)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        model(**inputs, **{cache_argument(model): cache}, use_cache=True)
    return form_of(config, cache, recipe)


def plan_shapes(
    model: PreTrainedModel,
    form: CacheForm,
    samples: Sequence[Mapping[str, Any]],
    ranges: Ranges | None,
) -> tuple[Shapes, tuple[str, ...]]:
    """All axes of all inputs, and the names of inputs that only the samples know.

    Raises:
        ExportError: samples that contradict one another, the model or `ranges`.
    """
    ids, mask = _names(form)
    roles: dict[str, tuple[str | int, ...]] = {ids: ("batch", "query"), mask: ("batch", "total")}
    if form.has_cross:
        roles["input_ids"] = roles["attention_mask"] = ("batch", "source")
    for slot in (*form.own_slots, *form.cross_slots):
        roles[slot.name] = slot.axes
    shapes = []
    extras: list[str] = []
    for sample in samples:
        found: dict[str, tuple[int, ...]] = {}
        if not isinstance(sample, Mapping):
            raise ExportError(f"A sample is a dict of inputs by name; got {type(sample).__name__}.")
        for name, value in sample.items():
            if value is None:
                continue
            if name == "past_key_values":
                if _is_filled(value):
                    found |= _cache_shapes(form, value)
            elif not isinstance(value, Tensor):
                raise ExportError(
                    f"A sample has {name}={value!r}: only tensors are inputs of a graph. Leave it "
                    f"out."
                )
            else:
                _check_name(model, form, name)
                found[name] = tuple(value.shape)
                if name not in _KNOWN and name not in extras:
                    extras.append(name)
        rows = found.get(ids)
        if rows is not None and not form.has_cross and not _has_cache(form, found):
            sizes = {"batch": rows[0], **form.sizes(0)}  # nothing is cached yet
            found |= {slot.name: slot.shape(sizes) for slot in form.own_slots}
        shapes.append(_one_at_a_time(found, ids, mask) if form.takes_one_token else found)
    if "position_ids" in extras:
        roles["position_ids"] = ("batch", "query")
    lacking = [name for name in extras if any(name not in sample for sample in samples)]
    if lacking:
        raise ExportError(f"{', '.join(lacking)}: in some samples only. Give it in all or in none.")
    bounds = _with_own(form, ranges or {})
    return guess(roles, shapes, bounds, form.windows, form.total), tuple(extras)


def _one_at_a_time(
    found: dict[str, tuple[int, ...]], ids: str, mask: str
) -> dict[str, tuple[int, ...]]:
    """A sample of several tokens as the graph sees its first: such calls are fed one by one."""
    if ids not in found:
        return found
    spare = found[ids][1] - 1
    new = {**found, ids: (found[ids][0], 1)}
    if mask in found:
        new[mask] = (found[mask][0], found[mask][1] - spare)
    if "position_ids" in found:
        new["position_ids"] = (found["position_ids"][0], 1)
    return new


def _has_cache(form: CacheForm, found: Mapping[str, Any]) -> bool:
    return any(slot.name in found for slot in form.own_slots)


def _with_own(form: CacheForm, ranges: Ranges) -> Ranges:
    """The user's ranges, and what the form itself pins.

    Raises:
        ExportError: they contradict each other.
    """
    bounds = dict(ranges)
    if form.takes_one_token and bounds.setdefault("query", 1) not in (1, (1, 1)):
        raise ExportError(
            f"ranges says query is {bounds['query']}; a layer keeps a state, and the model's code "
            f"goes on from a state one token at a time: query is 1. (Calls with more tokens are "
            f"fed one by one.)"
        )
    if form.is_static:
        batch = bounds.setdefault("batch", 1)
        if not isinstance(batch, int):
            raise ExportError(
                f"ranges says batch is {batch}; {form.recipe} keeps its rows in the graph: pin it "
                f"to one number."
            )
    return bounds


def _is_filled(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is None or int(length()) > 0


def _names(form: CacheForm) -> tuple[str, str]:
    prefix = "decoder_" if form.has_cross else ""
    return f"{prefix}input_ids", f"{prefix}attention_mask"


def _check_name(model: PreTrainedModel, form: CacheForm, name: str) -> None:
    if name.startswith("decoder_") and not form.has_cross:
        raise ExportError(f"A sample has {name!r}; the model has no encoder.")
    if not takes(model, name):
        raise ExportError(f"A sample has {name!r}, which {type(model).__name__} does not take.")
    if name not in _KNOWN and name in ("inputs_embeds", "labels", "encoder_outputs"):
        raise ExportError(f"A sample has {name!r}; graphs take ids: leave it out.")


def _cache_shapes(form: CacheForm, cache: Any) -> dict[str, tuple[int, ...]]:
    pairs = list(zip(form.own_slots, form.tensors(cache), strict=True))
    if form.has_cross:
        pairs += list(zip(form.cross_slots, form.cross_tensors(cache), strict=True))
    return {slot.name: tuple(tensor.shape) for slot, tensor in pairs}


def trace(
    model: PreTrainedModel,
    form: CacheForm,
    shapes: Shapes,
    extras: tuple[str, ...],
    samples: Sequence[Mapping[str, Any]],
    *,
    plain_operators: bool = False,
) -> list[Traced]:
    """Trace every part on an inflated sample: all dynamic axes distinct and at least 2.

    `plain_operators`: use those alone that every runtime knows.

    Raises:
        ExportError: the model's code makes a constant of an axis that should be free, or cannot be
            traced at all.
    """
    sizes = _inflated(shapes, form)
    inputs = _inputs(model, form, shapes, sizes, extras, samples)
    ids, mask = _names(form)
    own = [inputs[slot.name] for slot in form.own_slots]
    cross = [inputs[slot.name] for slot in form.cross_slots]
    masks = [inputs["attention_mask"]] if form.has_cross else []
    flat = [inputs[ids], *own, inputs[mask], *cross, *masks, *(inputs[name] for name in extras)]
    counts = (len(own), len(cross), len(masks), len(extras))
    batch = next((axis.size for axis in shapes.axes if axis.role == "batch"), None)
    step = _Flat(DecoderStep(model, form, extras, batch), counts)
    names, outputs = part_names(form, "decoder", extras)
    info = PartInfo(name="decoder", inputs=names, outputs=outputs)
    traced = [_export(step, flat, info, shapes, plain_operators)]
    if form.has_cross:
        names, outputs = part_names(form, "encoder", extras)
        info = PartInfo(name="encoder", inputs=names, outputs=outputs)
        flat = [inputs["input_ids"], inputs["attention_mask"]]
        encoder = _FlatEncoder(EncoderStep(model, form))
        traced.append(_export(encoder, flat, info, shapes, plain_operators))
    return traced


class _Flat(nn.Module):
    """`DecoderStep` with its tensors one by one."""

    def __init__(self, step: DecoderStep, counts: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.step = step
        self.counts = counts

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        num_own = self.counts[0]
        ids, mask = tensors[0], tensors[1 + num_own]
        rest = [*tensors[1 : 1 + num_own], *tensors[2 + num_own :]]
        groups = []
        for count in self.counts:
            groups.append(rest[:count])
            rest = rest[count:]
        logits, held = self.step(ids, mask, *groups)
        return [logits, *held]


class _FlatEncoder(nn.Module):
    def __init__(self, step: EncoderStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        result: list[Tensor] = self.step(*tensors)
        return result


def _inflated(shapes: Shapes, form: CacheForm) -> dict[str, int]:
    """A size for every symbol: distinct, at least 2, within its bounds."""
    taken: set[int] = set()
    sizes: dict[str, int] = {}
    symbols = shapes.symbols
    # The tightest first, so that the rest can avoid what it took.
    for name in sorted(symbols, key=lambda key: symbols[key].high or 1 << 40):
        axis = symbols[name]
        candidates: tuple[int, ...] = (
            (2, *_SIZES) if name == "batch" else (*_SIZES, 2, 4, 6, 8, 9, 10)
        )
        if "blocks" in symbols and name in ("query", "tail"):  # so many that blocks are packed
            candidates = {"query": (197, 135, 67), "tail": (71,)}[name] + candidates
        allowed = [
            size
            for size in candidates
            if size >= axis.low and (axis.high is None or size <= axis.high)
        ]
        if not allowed:
            low = next(size for size in itertools.count(max(2, axis.low)) if size not in taken)
            allowed = [low] if axis.high is None or low <= axis.high else []
        if not allowed:
            raise ExportError(
                f"The axis {name!r} has room for {axis.high} only; pin it: "
                f"ranges={{{name!r}: {axis.high}}}."
            )
        size = next((size for size in allowed if size not in taken), allowed[0])
        taken.add(size)
        sizes[name] = size
    if form.room is not None and sizes.get("query", 0) >= form.room - 1:
        raise ExportError(f"{form.recipe} has room for {form.room} tokens; at least 8 are needed.")
    return sizes


def _size(axis: Axis, sizes: Mapping[str, int], spare: int) -> int:
    if axis.size is not None:
        return axis.size
    if is_sum(axis.name):
        total = total_of(axis.name, sizes)
        if total is not None:
            return total + (spare if axis.role == "total" else 0)
        # What was seen is in no shape: the mask has a length of its own.
        return max(sizes.values()) * 2 + spare
    return sizes[axis.name]


def _inputs(
    model: PreTrainedModel,
    form: CacheForm,
    shapes: Shapes,
    sizes: Mapping[str, int],
    extras: tuple[str, ...],
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Inputs of those sizes: padded on the left, contiguous."""
    pinned = {axis.role: axis.size for axis in shapes.axes if axis.role and axis.size is not None}
    known = {**sizes, **pinned}
    inputs: dict[str, Tensor] = {}
    dtype, device = model.dtype, model.device
    generator = torch.Generator().manual_seed(0)
    # Where windows forget, the mask is longer than what is stored and new.
    spare = 0 if form.keeps_all else 2
    slots = {slot.name: slot for slot in (*form.own_slots, *form.cross_slots)}
    for tensor in dict.fromkeys(axis.tensor for axis in shapes.axes):
        axes = shapes.of(tensor)
        shape = [_size(axis, known, spare) for axis in axes]
        if tensor in slots:
            kept = slots[tensor].torch_dtype(dtype)
            inputs[tensor] = torch.randn(shape, generator=generator).abs().to(device, kept)
        elif "mask" in tensor:
            mask = torch.ones(shape, dtype=torch.int64, device=device)
            mask[0, 0] = 0
            inputs[tensor] = mask
        elif tensor in extras:
            given = next(sample[tensor] for sample in samples)
            inputs[tensor] = torch.zeros(shape, dtype=given.dtype, device=device)
        else:
            inputs[tensor] = torch.ones(shape, dtype=torch.int64, device=device)
    return inputs


def _export(
    step: nn.Module, flat: Sequence[Tensor], info: PartInfo, shapes: Shapes, plain: bool
) -> Traced:
    dynamic = []
    for name in info.inputs:
        axes = shapes.of(name)
        dims: dict[int, Any] = {}
        for axis in axes:
            if axis.is_dynamic:
                dims[axis.dim] = torch.export.Dim.DYNAMIC
        dynamic.append(dims)
    try:
        with torch.no_grad(), traceable(plain_experts=plain), _free_sizes():
            program = torch.export.export(
                step, tuple(flat), dynamic_shapes=(tuple(dynamic),), strict=False
            )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            f"The model's {info.name} cannot be traced with free lengths: "
            f"{type(error).__name__}: {' '.join(lines[:6])[:600]}"
        ) from error
    symbols = _symbols(program, info, shapes)
    highs = {}
    for symbol, interval in program.range_constraints.items():
        known, upper = symbols.get(str(symbol)), interval.upper
        if known is not None and upper.is_Integer and int(upper) < _UNBOUNDED:
            highs[known] = int(upper)
    return Traced(info, program, symbols, highs)


def _free_sizes() -> Any:
    """Sizes 0 and 1 are not asked for while tracing, so that they are served like others."""
    return shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def _symbols(
    program: torch.export.ExportedProgram, info: PartInfo, shapes: Shapes
) -> dict[str, str]:
    """torch's names of dimensions to ours; checks that nothing became a constant."""
    users = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT
    ]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    symbols: dict[str, str] = {}
    for name, user in zip(info.inputs, users, strict=True):
        value = nodes[user].meta["val"]
        for axis, size in zip(shapes.of(name), value.shape, strict=True):
            if not axis.is_dynamic:
                continue
            if isinstance(size, int):
                raise ExportError(
                    f"{name}[{axis.dim}] ({axis.name}) became the constant {size} in the graph: "
                    f"the model's code depends on it. Pin it by ranges={{{axis.name!r}: {size}}}, "
                    f"or export another length separately."
                )
            symbols.setdefault(str(size), axis.name)
    return {one: name for one, name in symbols.items() if one.isidentifier()}
