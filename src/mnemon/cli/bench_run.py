"""What `mnemon bench` measures: caches of equal content, taking turns in one process.

Every contender holds a cache of its own, filled to the same length with the same numbers. Then
they take turns at decoding the same tokens, a few steps each, so that whatever else the machine
does falls on all alike. A figure is the median over all steps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon.cli.contenders import Contender, held_bytes, stored_bytes
from mnemon.cli.trial import PeakMemory
from mnemon.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

REFERENCE = "DynamicCache"
FILL_CHUNK = 4096
WARM_UP_STEPS = 2
APPENDS = 12
CHECK_TOKENS = 16

# Shapes of random weights, for speed alone: name -> fields of a LlamaConfig.
SHAPES: dict[str, dict[str, int]] = {
    "162m": {
        "num_hidden_layers": 8,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 3072,
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 256,
        "max_position_embeddings": 8_192,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured.

    Args:
        contexts: tokens held before decoding begins.
        rounds: turns that each contender takes.
        steps: decode steps in each turn.
        prefill: fill by running the model over real tokens (and time it) instead of with random
            keys and values.
        prefill_rounds: how often each contender fills an empty cache, in turns, when `prefill`.
        check: also compare tokens in float32.
        batch: rows.
    """

    contexts: tuple[int, ...]
    rounds: int = 4
    steps: int = 8
    prefill: bool = True
    prefill_rounds: int = 1
    check: bool = True
    batch: int = 1

    @property
    def capacity(self) -> int:
        """Tokens that come on top of a context."""
        return WARM_UP_STEPS + self.rounds * self.steps + APPENDS + 1


@dataclass(slots=True, kw_only=True)
class Result:
    """What one contender did at one context.

    Attributes:
        context: tokens held when decoding began.
        name, library: of the contender.
        step_s: seconds of every decode step.
        prefill_s: seconds of every filling by the model; none when filled with random numbers.
        append_s: seconds to append one token to all layers, without the model.
        stored_bytes, held_bytes: of the cache at the end; held counts reserve.
        peak_bytes: how far memory rose while it was filled and warmed up; None where unknown.
        same_tokens: tokens equal to the reference's in float32; None when not compared.
        error: why it cannot run with this model, or "".
    """

    context: int
    name: str
    library: str
    step_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    append_s: float | None = None
    stored_bytes: int | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    same_tokens: bool | None = None
    error: str = ""

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds per decode step."""
        return 1e3 * statistics.median(self.step_s) if self.step_s else None

    @property
    def prefill_median_s(self) -> float | None:
        """Median seconds to fill an empty cache."""
        return statistics.median(self.prefill_s) if self.prefill_s else None

    def to_dict(self, batch: int, reference: Result | None) -> dict[str, Any]:
        """JSON-able, with what follows from the raw figures."""
        step = self.step_ms
        base = reference.step_ms if reference is not None else None
        filled = self.prefill_median_s
        base_filled = reference.prefill_median_s if reference is not None else None
        return {
            "context": self.context,
            "cache": self.name,
            "library": self.library,
            "error": self.error or None,
            "step_ms": step,
            "step_ms_min": 1e3 * min(self.step_s) if self.step_s else None,
            "tokens_per_s": 1e3 * batch / step if step else None,
            "speed_ratio": base / step if base and step else None,
            "prefill_tokens_per_s": batch * self.context / filled if filled else None,
            "prefill_ratio": base_filled / filled if base_filled and filled else None,
            "append_us": None if self.append_s is None else 1e6 * self.append_s,
            "stored_bytes": self.stored_bytes,
            "held_bytes": self.held_bytes,
            "peak_bytes": self.peak_bytes,
            "same_tokens": self.same_tokens,
            "steps_ms": [round(1e3 * seconds, 4) for seconds in self.step_s],
            "prefills_s": [round(seconds, 7) for seconds in self.prefill_s],
        }


def random_model(shape: str, dtype: torch.dtype, device: Any) -> PreTrainedModel:
    """A Llama with random weights of a named shape.

    Raises:
        ModelError: no such shape.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise ModelError(f"unknown shape {shape!r}; valid are {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(SHAPES[shape])
    config = LlamaConfig(**sizes, tie_word_embeddings=False, eos_token_id=None)
    # Not .to(dtype): that would round the rotary frequencies too, which no loaded model has.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to(device)
    model.eval()
    return model


def measure(
    model: PreTrainedModel,
    rivals: Sequence[Contender],
    settings: Settings,
    progress: Callable[[str, int], None],
) -> list[Result]:
    """Measure all contenders at all contexts.

    Args:
        model: decoder-only, in evaluation mode.
        rivals: the reference among them.
        settings: what to measure.
        progress: called with what is being done and the units of work just finished.

    Returns:
        One result per context and contender, in that order.

    Raises:
        ModelError: an encoder-decoder model.
    """
    if model.config.is_encoder_decoder:
        raise ModelError("bench decodes from a prompt alone; pass a decoder-only model.")
    results = []
    for context in settings.contexts:
        results += _at(model, rivals, settings, context, progress)
        gc.collect()
    return results


def num_units(settings: Settings, rivals: Sequence[Contender]) -> int:
    """Units of work that `measure` reports, for a progress bar."""
    fills = settings.prefill_rounds if settings.prefill else 1
    per_rival = fills + settings.rounds + (1 if settings.check else 0)
    return len(settings.contexts) * len(rivals) * per_rival


def _at(
    model: PreTrainedModel,
    rivals: Sequence[Contender],
    settings: Settings,
    context: int,
    progress: Callable[[str, int], None],
) -> list[Result]:
    results = [Result(context=context, name=r.name, library=r.library) for r in rivals]
    caches: dict[str, Any] = {}
    ids = _tokens(model, settings.batch, context + settings.capacity)
    if settings.prefill:
        # Whoever comes first would pay for first use: kernels chosen, memory fetched.
        _forward(model, ids[:, :context], None)
    for rival, result in zip(rivals, results, strict=True):
        progress(f"{context:,} tokens: fill {rival.name}", 0)
        try:
            caches[rival.name] = _filled(model, rival, result, settings, ids)
        except Exception as error:  # each library fails in its own way; the others go on
            if rival.name == REFERENCE:
                raise
            result.error = _first_line(error)
        progress("", 1)
    running = [(r, s) for r, s in zip(rivals, results, strict=True) if not s.error]
    for turn in range(1, settings.prefill_rounds if settings.prefill else 0):
        for rival, result in _in_turn(running, turn):
            progress(f"{context:,} tokens: prefill {rival.name}", 0)
            with rival.session(model):
                cache = rival.make(context + settings.capacity)
                result.prefill_s.append(_prefill(model, cache, ids[:, :context]))
            del cache
            progress("", 1)
    start = context + WARM_UP_STEPS
    for turn in range(settings.rounds):
        at = start + turn * settings.steps
        for rival, result in _in_turn(running, turn):
            progress(f"{context:,} tokens: decode {rival.name}", 0)
            with rival.session(model):
                for position in range(at, at + settings.steps):
                    result.step_s.append(_step(model, caches[rival.name], ids, position))
            progress("", 1)
    for rival, result in running:
        cache = caches[rival.name]
        result.stored_bytes, result.held_bytes = stored_bytes(cache), held_bytes(cache)
        result.append_s = _append_s(model, cache, ids)
    caches.clear()
    if settings.check:
        _check(model, rivals, results, settings, context, progress)
    return results


def _in_turn(running: list[tuple[Contender, Result]], turn: int) -> list[tuple[Contender, Result]]:
    """Every other round the other way round: nobody always follows the same neighbour."""
    return running if turn % 2 == 0 else running[::-1]


def _filled(
    model: PreTrainedModel, rival: Contender, result: Result, settings: Settings, ids: torch.Tensor
) -> Any:
    """The contender's cache holding `context` tokens and the warm-up steps."""
    context = result.context
    gc.collect()
    with PeakMemory(model.device) as peak:
        cache = rival.make(context + settings.capacity)
        with rival.session(model):
            if settings.prefill:
                result.prefill_s.append(_prefill(model, cache, ids[:, :context]))
            else:
                fill(model, cache, ids, context)
            for position in range(context, context + WARM_UP_STEPS):
                _step(model, cache, ids, position)
    result.peak_bytes = peak.bytes
    return cache


def _prefill(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> float:
    """Seconds to fill an empty cache by the model."""
    _wait(model)
    begin = time.perf_counter()
    _forward(model, ids, cache)
    _wait(model)
    return time.perf_counter() - begin


def fill(model: PreTrainedModel, cache: Any, ids: torch.Tensor, num_tokens: int) -> None:
    """Fill a cache to `num_tokens` with random keys and values, the same for every cache.

    The model reads the first token; the rest is put in by `cache.update`. Costs a copy, where a
    prefill of a long context takes minutes.

    Raises:
        ModelError: a layer that keeps something else than keys and values.
    """
    import torch

    shapes = _shapes(model, ids)
    if None in shapes:
        raise ModelError(
            f"the layers of a {model.config.model_type!r} model keep more than keys and values, "
            "which cannot be made up; run with --prefill."
        )
    _forward(model, ids[:, :1], cache)
    generator = torch.Generator().manual_seed(num_tokens)
    for begin in range(1, num_tokens, FILL_CHUNK):
        length = min(FILL_CHUNK, num_tokens - begin)
        for index, shape in enumerate(shapes):
            if shape is not None:
                cache.update(*shape.random(length, model.device, generator), index)


class _Shape(NamedTuple):
    """What one layer is given for one token."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def random(
        self, length: int, device: Any, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, heads, length, dim]``."""
        import torch

        keys, values = (
            torch.randn(self.batch, self.heads, length, dim, generator=generator)
            for dim in (self.key_dim, self.value_dim)
        )
        return keys.to(device, self.dtype), values.to(device, self.dtype)


def _shapes(model: PreTrainedModel, ids: torch.Tensor) -> list[_Shape | None]:
    """What each layer is given, from one token; None for layers that keep something else."""
    from transformers import DynamicCache

    probe = DynamicCache(config=model.config)
    _forward(model, ids[:, :1], probe)
    shapes: list[_Shape | None] = []
    for layer in probe.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or hasattr(layer, "conv_states"):
            shapes.append(None)
        else:
            batch, heads, _, key_dim = keys.shape
            shapes.append(_Shape(batch, heads, key_dim, values.shape[3], keys.dtype))
    return shapes


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index,arg-type,unused-ignore]
    return torch.randint(0, vocabulary, (batch, length), generator=generator).to(model.device)


def _forward(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        out = model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        )
    logits: torch.Tensor = out.logits
    return logits


def _step(model: PreTrainedModel, cache: Any, ids: torch.Tensor, position: int) -> float:
    """Seconds of one decode step."""
    token = ids[:, position : position + 1]
    _wait(model)
    begin = time.perf_counter()
    _forward(model, token, cache)
    _wait(model)
    return time.perf_counter() - begin


def _wait(model: PreTrainedModel) -> None:
    """An accelerator runs ahead of Python: a clock is read only once it is idle."""
    if model.device.type != "cpu":
        import torch

        torch.accelerator.synchronize()


def _append_s(model: PreTrainedModel, cache: Any, ids: torch.Tensor) -> float | None:
    """Median seconds to append one token to every layer; None where layers keep more than that."""
    import torch

    shapes = _shapes(model, ids)
    generator = torch.Generator().manual_seed(2)
    times = []
    for _ in range(APPENDS):
        new = [shape.random(1, model.device, generator) for shape in shapes if shape is not None]
        if len(new) < len(shapes):
            return None
        _wait(model)
        begin = time.perf_counter()
        with torch.no_grad():
            for index, (keys, values) in enumerate(new):
                cache.update(keys, values, index)
        _wait(model)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _check(
    model: PreTrainedModel,
    rivals: Sequence[Contender],
    results: list[Result],
    settings: Settings,
    context: int,
    progress: Callable[[str, int], None],
) -> None:
    """Note whether each contender gives the reference's tokens, in float32."""
    saved = [(weight, weight.dtype) for weight in model.parameters()]
    expected: list[int] | None = None
    try:
        for weight, _ in saved:
            weight.data = weight.data.float()  # and back is exact: nothing is lost on the way up
        for rival, result in zip(rivals, results, strict=True):
            progress(f"{context:,} tokens: check {rival.name}", 0)
            if not result.error:
                tokens = _greedy(model, rival, settings, context)
                expected = tokens if rival.name == REFERENCE else expected
                if expected is not None and rival.lossless:
                    result.same_tokens = tokens == expected
            progress("", 1)
    finally:
        for weight, dtype in saved:
            weight.data = weight.data.to(dtype)


def _greedy(
    model: PreTrainedModel, rival: Contender, settings: Settings, context: int
) -> list[int]:
    """The next tokens that the model chooses itself."""
    import torch

    ids = _tokens(model, settings.batch, context + 1)
    cache = rival.make(context + CHECK_TOKENS + 1)
    chosen: list[int] = []
    with rival.session(model):
        if settings.prefill:
            _forward(model, ids[:, :context], cache)
        else:
            fill(model, cache, ids, context)
        token = ids[:, context:]
        for _ in range(CHECK_TOKENS):
            token = torch.argmax(_forward(model, token, cache)[:, -1], dim=-1, keepdim=True)
            chosen += token.flatten().tolist()
    return chosen


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
