"""Comparing an export with its model, shape by shape, in a process that may die.

The model answers here, with transformers' own cache; the export answers in a child process, which
reports every shape as it is done. If the child dies or hangs, the shape at hand is noted and
another child goes on with the next.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mnemon.cache import Cache
from mnemon.errors import ExportError
from mnemon.export.axes import Axis, Shapes
from mnemon.export.exported import Exported
from mnemon.export.report import Case, Report, Verdict
from mnemon.export.tracing import read_form
from mnemon.hf.exporting import DynamicCache, EncoderDecoderCache, cache_argument, takes
from mnemon.recipe import parse

__all__ = ["TIMEOUT_S", "grid", "tolerance", "verify"]

TIMEOUT_S = 600.0
_SAMPLE_PAST = 5
_MOST_WALKED = 256  # tokens of a past that the model is fed; longer ones are random numbers
_MOST_BYTES = 1 << 30  # of a random past
_STEPS = 3
_PACKED_AGAIN = 100.0


def grid(exported: Exported) -> list[Case]:
    """The shapes to try: batch x past x query, a strided cache, tokens around every length at which
    a layer changes what it does, and calls in a row on what the export itself returned."""
    form, shapes = exported.form, exported.shapes
    known = shapes.symbols
    batches = _allowed(known.get("batch"), (1, 2, 3), _pinned(shapes, "batch"))
    queries = _allowed(known.get("query"), (1, 3), _pinned(shapes, "query"))
    most = exported.manifest.max_tokens
    lengths = [
        length
        for length in sorted({0, 1, _SAMPLE_PAST + 1, 7, *form.lengths})
        if length >= 0
        and (most is None or length + max(queries) <= most)
        and _fits(exported, length)
    ]
    sources = [0]
    if form.has_cross:
        sources = _allowed(known.get("source"), (6, 1), _pinned(shapes, "source"))
    walked = [length for length in lengths if length <= _MOST_WALKED]
    cases = [
        Case(batch=batch, past=length, query=new, source=sources[0])
        for batch in batches
        for length in walked
        for new in queries
    ]
    cases += [replace(cases[-1], source=source) for source in sources[1:]]
    for length in set(lengths) - set(walked):
        case = Case(batch=batches[0], past=length, query=queries[0], made_by="random")
        if not (form.has_cross or form.is_static) and _bytes(exported, case) <= _MOST_BYTES:
            cases.append(case)
    longest = max(cases, key=lambda case: (case.past, case.batch))
    if longest.past and not form.is_static:
        cases.append(replace(longest, strided=True))
    batch = batches[min(1, len(batches) - 1)]
    steps = [
        Case(batch=batch, past=length, query=queries[0], source=sources[0], steps=_STEPS)
        for length in walked
        if length
        and length % _stride(shapes) == 0
        and (most is None or length + _STEPS * queries[0] <= most)
        and all(_fits(exported, length + extra) for extra in range(_STEPS * queries[0]))
    ]
    if form.is_static:  # what it holds cannot be given: each case begins with an empty cache
        rows = [case for case in cases if not case.past or case.past % _stride(shapes) == 0]
        return [replace(case, made_by="export") for case in rows + steps[-1:]]
    return cases + [replace(case, made_by="export") for case in steps[-3:]]


def _stride(shapes: Shapes) -> int:
    """Tokens that a call can only take a multiple of."""
    return _pinned(shapes, "query") or 1


def _fits(exported: Exported, num_tokens: int) -> bool:
    """Whether the export serves a cache of so many tokens."""
    sizes = exported.form.sizes(num_tokens)
    for axis in exported.shapes.axes:
        size = sizes.get(axis.role)
        if size is None:
            continue
        low, high = (axis.low, axis.high) if axis.size is None else (axis.size, axis.size)
        if size < low or (high is not None and size > high):
            return False
    return True


def _bytes(exported: Exported, case: Case) -> int:
    past = exported.form.empty(case.batch, exported.dtype, "meta", case.past)
    return sum(one.numel() * one.element_size() for one in past)


def _pinned(shapes: Shapes, role: str) -> int | None:
    """The size of an axis that `ranges` pinned."""
    for axis in shapes.axes:
        if axis.size is not None and "pinned" in axis.evidence and axis.role == role:
            return axis.size
    return None


def _allowed(axis: Axis | None, sizes: Sequence[int], pinned: int | None) -> list[int]:
    if axis is None:
        return [pinned] if pinned is not None else list(sizes)[:1]
    fitting = [
        size for size in sizes if size >= axis.low and (axis.high is None or size <= axis.high)
    ]
    return fitting or [axis.low]


def tolerance(reference: Tensor) -> float:
    """The difference that is allowed: 1e-5 of the largest number, more in half precision."""
    unit = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
    epsilon = torch.finfo(reference.dtype).eps
    return unit * max(1e-5, 8 * epsilon if reference.dtype.itemsize < 4 else 0.0)


def verify(
    model: PreTrainedModel,
    exported: Exported,
    *,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> Report:
    """Compare an export with its model on `grid`.

    Args:
        model: what was exported.
        exported: the export.
        timeout_s: for all shapes together.
        progress: called with what is being done and the shapes just finished.
    """
    form = read_form(model, parse(exported.form.recipe))
    if form != exported.form:
        raise ExportError(
            f"This export is of another model: its cache has other layers or other sizes than that "
            f"of the {model.config.model_type} model that came."
        )
    cases = grid(exported)
    with tempfile.TemporaryDirectory(prefix="mnemon-verify-") as folder:
        path = Path(folder)
        expected: list[tuple[float, float]] = []
        for index, case in enumerate(cases):
            progress(f"the model itself: {case}", 0)
            tensors, allowed = _reference(model, exported, case)
            save_file(tensors, path / f"{index}.safetensors")
            expected.append(allowed)
        facts = [asdict(case) for case in cases]
        (path / "cases.json").write_text(json.dumps(facts), "utf-8")
        return Report(tuple(_answers(exported, path, cases, expected, timeout_s, progress)))


def _reference(
    model: PreTrainedModel,
    exported: Exported,
    case: Case,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Inputs and the model's own answer for one shape, with what may differ; the logits are those
    of the calls that are compared, one after the other."""
    form, device = exported.form, model.device
    generator = torch.Generator().manual_seed(case.batch * 1000 + case.past * 10 + case.query)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    total = case.past + case.query * case.steps
    ids = torch.randint(vocabulary, (case.batch, total), generator=generator).to(device)
    mask = torch.ones((case.batch, total), dtype=torch.int64, device=device)
    # Padded on the left; a model with states takes no padding once it goes token by token.
    most = total - 1 if not form.takes_one_token else case.past if case.past > 1 else 0
    # Once without padding and without positions: the model numbers its tokens by itself.
    plain = case.batch == 1 and case.past == 0 and "position_ids" not in exported.manifest.extras
    mask[0, : 0 if plain else min(2, most)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    # transformers' own cache; where numbers are packed, what mnemon's gives outside of a graph.
    packs = bool(form.recipe) and not form.is_static
    cache: Any = Cache(model.config, form.recipe) if packs else DynamicCache(config=model.config)
    prefix = ""
    if form.has_cross:
        prefix = "decoder_"
        source = torch.randint(vocabulary, (case.batch, case.source), generator=generator)
        source_mask = torch.ones_like(source)
        if case.source > 1 and case.batch > 1:
            source_mask[0, -1] = 0
        inputs["attention_mask"] = source_mask.to(device)
        tensors |= {"source_ids": source, "source_mask": source_mask}
        if not packs:
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        with torch.no_grad():
            inputs["encoder_outputs"] = model.get_encoder()(
                input_ids=source.to(device), attention_mask=source_mask.to(device), return_dict=True
            )

    def feed(start: int, stop: int) -> Tensor:
        named = dict(inputs)
        named[f"{prefix}input_ids"] = ids[:, start:stop]
        named[f"{prefix}attention_mask"] = mask[:, :stop]
        if takes(model, "position_ids") and not plain:
            named["position_ids"] = positions[:, start:stop]
        for name in exported.manifest.extras:
            if name != "position_ids":
                named[name] = _extra(exported, name, case.batch, start, stop - start).to(device)
        named[cache_argument(model)] = cache
        outputs = model(**named, use_cache=True, return_dict=True)
        logits: Tensor = outputs.logits
        return logits

    past = form.empty(case.batch, exported.dtype, device)
    with torch.no_grad():
        if case.made_by == "random":
            past = form.empty(case.batch, exported.dtype, device, case.past)
            past = [torch.randn(one.shape, generator=generator).to(one) for one in past]
            form.fill(cache, [one.clone() for one in past], case.past)
        elif case.past:
            feed(0, case.past)
            past = [] if form.is_static else [one.clone() for one in form.tensors(cache)]
        stops = range(case.past, total, case.query)
        logits = torch.cat([feed(start, start + case.query) for start in stops], dim=1)
    held = [] if form.is_static else form.tensors(cache)
    tensors |= {"input_ids": ids, "attention_mask": mask, "logits": logits}
    for name in exported.manifest.extras:
        if name == "position_ids":
            tensors["extra.position_ids"] = positions
        else:
            extra = _extra(exported, name, case.batch, case.past, case.query)
            tensors[f"extra.{name}"] = extra
    for slot, before, after in zip(form.own_slots, past, held, strict=True):
        tensors[f"past.{slot.name}"] = before
        tensors[f"held.{slot.name}"] = after
    floats = [one for one in held if one.is_floating_point()]
    apart = tolerance(logits)
    if packs and case.made_by == "export":  # a code may have been rounded to the other side
        apart *= _PACKED_AGAIN
    allowed = apart, max((tolerance(one) for one in floats), default=1e-5)
    return {name: one.detach().cpu().contiguous() for name, one in tensors.items()}, allowed


def _extra(exported: Exported, name: str, batch: int, past: int, query: int) -> Tensor:
    """A further input for one call: zeros and ones, in the shape that its axes say."""
    sizes = {"batch": batch, "query": query, "past": past}
    shape = []
    for axis in exported.shapes.of(name):
        terms = axis.name.split(" + ")
        if axis.size is not None:
            shape.append(axis.size)
        elif all(term in sizes for term in terms):
            shape.append(sum(sizes[term] for term in terms))
        else:
            shape.append(max(2, axis.low))
    dtype = getattr(torch, exported.manifest.extras[name])
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(2, shape, generator=generator).to(dtype)


def _answers(
    exported: Exported,
    path: Path,
    cases: Sequence[Case],
    expected: Sequence[tuple[float, float]],
    timeout_s: float,
    progress: Callable[[str, int], None],
) -> list[Verdict]:
    import time

    verdicts: list[Verdict] = []
    deadline = time.monotonic() + timeout_s
    while len(verdicts) < len(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        begin = len(verdicts)
        child = _Child(exported.folder, path, begin)
        try:
            while len(verdicts) < len(cases):
                case, allowed = cases[len(verdicts)], expected[len(verdicts)]
                progress(f"the export: {case}", 0)
                line = child.line(deadline - time.monotonic())
                if line is None:
                    break
                try:
                    found = json.loads(line)
                except ValueError:
                    break  # it died while it wrote
                verdicts.append(_verdict(case, found, allowed))
                progress("", 1)
            else:
                break
            if child.timed_out:
                break
            verdicts.append(
                Verdict(case=cases[len(verdicts)], status="crashed", reason=child.last_words())
            )
            progress("", 1)
            if len(verdicts) - begin == 1 and child.never_loaded:
                reason = verdicts[-1].reason
                verdicts += [
                    Verdict(case=case, status="crashed", reason=reason)
                    for case in cases[len(verdicts) :]
                ]
        finally:
            child.stop()
    late = f"not done within {timeout_s:g} s"
    return verdicts + [
        Verdict(case=case, status="late", reason=late) for case in cases[len(verdicts) :]
    ]


def _verdict(case: Case, found: Mapping[str, Any], allowed: tuple[float, float]) -> Verdict:
    if "error" in found:
        return Verdict(case=case, status="refused", reason=found["error"])
    logits, cache = float(found["logits"]), float(found["cache"])
    # Not "greater than": a nan is wrong, too.
    right = logits <= allowed[0] and cache <= allowed[1] and not found.get("shapes")
    return Verdict(
        case=case,
        status="right" if right else "wrong",
        logits=logits,
        cache=cache,
        tolerance=max(allowed),
        reason=found.get("shapes", ""),
    )


class _Child:
    """A process that runs the export on the cases from `begin` on."""

    def __init__(self, folder: Path, path: Path, begin: int) -> None:
        words = [sys.executable, "-m", "mnemon.export.worker", str(folder), str(path), str(begin)]
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=self._errors, stdin=subprocess.DEVNULL, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.timed_out = False
        self.never_loaded = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(line)
        self._lines.put(None)

    def line(self, timeout_s: float) -> str | None:
        """The next answer; None if there will be none."""
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.01))
        except queue.Empty:
            self.timed_out = True
            return None
        if line is not None and '"loaded"' in line:
            self.never_loaded = False
            return self.line(timeout_s)
        return line

    def last_words(self) -> str:
        """Why it died."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the process neither answers nor ends"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        ending = f": {lines[-1][:300]}" if lines else ""
        return f"the process died ({-code if code < 0 else code}){ending}"

    def stop(self) -> None:
        """Make sure it is gone."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
