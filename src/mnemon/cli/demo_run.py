"""The measurements behind `mnemon demo`: nothing here is printed, and nothing is assumed.

Sides take turns: every round runs every cache once, and each figure is the median of the rounds,
so that a machine that speeds up or slows down does not favour whoever ran at the right moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from mnemon.cli import demo_reuse, trial
from mnemon.cli.contenders import (
    REFERENCE,
    Contender,
    contenders,
    held_bytes,
    stored_bytes,
)
from mnemon.cli.demo_result import DemoResult, Row, SpeedPoint
from mnemon.cli.environment import environment
from mnemon.cli.models import BUNDLED_NAME, LoadedModel
from mnemon.cli.sources import InputError, Source, context_limit, encode

if TYPE_CHECKING:
    import torch

__all__ = ["DemoOptions", "run"]

ROUNDS = 3
SCORED_TOKENS = 256
MEMORY_NEW = 8
SWEEP_NEW = 16
MIN_CONTEXT = 64
# A busy or small machine measures less rather than longer: seconds for everything, and the share
# of it after which a kind of measurement takes no further round, context or distance.
TIME_S = 120.0
ROUNDS_SHARE, SCORE_SHARE, SWEEP_SHARE, RECALL_SHARE = 0.35, 0.6, 0.85, 0.95
RECALL_DISTANCES = (32, 128, 512, 1024, 2048)
RECALL_SAMPLES = 8
RECALL_ROOM = 128  # a recall prompt is this much longer than its distance, at most
RECALL_FILLER = 60_000  # characters of text between what is planted and what is asked

Advance = Callable[[str], None]  # called before each piece of work with what it is


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo is asked to do."""

    context: int
    num_new: int
    rounds: int = ROUNDS


class Demo:
    """One run: the model, the text, the contenders, and the rows that fill up."""

    def __init__(self, loaded: LoadedModel, source: Source, options: DemoOptions) -> None:
        import torch

        self.loaded, self.model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        self.source, self.options = source, options
        self.started = time.perf_counter()
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.num_rounds = 0
        self.num_new = options.num_new
        ids = encode(self.tokenizer, source.text)
        self.limit = context_limit(self.model.config)
        self.context = self._context(len(ids))
        self.ids = torch.tensor([ids], device=self.model.device)
        self.contenders = contenders(self.model)
        self.rows = {
            each.name: Row(name=each.name, library=each.library) for each in self.contenders
        }

    def _context(self, num_ids: int) -> int:
        """Tokens of the prompt: as asked, or fewer where the text or the model is shorter."""
        reserve = max(self.num_new, SCORED_TOKENS)
        most = num_ids - reserve
        if self.limit is not None:
            most = min(most, self.limit - reserve)
        if most < MIN_CONTEXT:
            raise InputError(
                f"{self.source.name} gives {num_ids:,} tokens"
                + (f" and the model takes {self.limit:,}" if self.limit else "")
                + f"; the demo needs at least {MIN_CONTEXT + reserve:,} "
                f"({MIN_CONTEXT} of prompt and {reserve} to compare). Use a longer --file, "
                "fewer --new-tokens, or another model."
            )
        if self.options.context > most:
            self.notes.append(
                f"The context was shortened from {self.options.context:,} to {most:,} tokens: "
                "that is what the text and the model leave."
            )
        return min(self.options.context, most)

    @property
    def able(self) -> list[Contender]:
        """The contenders that have not failed."""
        return [each for each in self.contenders if not self.rows[each.name].error]

    def out_of_time(self, share: float) -> bool:
        """Whether more than this share of the time is spent."""
        return time.perf_counter() - self.started > share * TIME_S

    def has_time(self, share: float, else_left_out: str) -> bool:
        """Whether there is time for a piece of work; if not, it is noted as left out."""
        if self.out_of_time(share):
            self.left_out.append(else_left_out)
            return False
        return True

    def all_notes(self) -> list[str]:
        """What a reader has to know beside the figures."""
        if not self.left_out:
            return self.notes
        return [*self.notes, f"To keep the run short on this machine: {', '.join(self.left_out)}."]

    def sweep_contexts(self) -> list[int]:
        """Shorter and longer contexts than the main one, for the chart of speed."""
        longest = self.ids.shape[1] - SWEEP_NEW
        if self.limit is not None:
            longest = min(longest, self.limit - SWEEP_NEW)
        wanted = {self.context // 8, self.context // 2, min(2 * self.context, longest)}
        kept = {context for context in wanted if context >= 32 and context != self.context}
        return sorted(kept, reverse=True)  # the longest tells most, should time run out

    def attempt(self, each: Contender, work: Callable[..., None], *arguments: Any) -> None:
        """Do one contender's work; what this cache cannot do with this model goes in its row."""
        try:
            with each.session(self.model):
                work(each, *arguments)
        except Exception as error:  # any cache may fail in its own way; the others go on
            if each.name == REFERENCE:
                raise
            lines = str(error).strip().splitlines() or [""]
            self.rows[each.name].error = f"{type(error).__name__}: {lines[0]}"

    def main_rounds(self, advance: Advance) -> None:
        """Fill speed, memory, size and text of every row."""
        prompt = self.ids[:, : self.context]
        # The very first run of all loads kernels; it would be charged to whoever comes first.
        trial.generate(self.model, prompt, self.contenders[0].make(self.context + 2), 2)
        trials: dict[str, list[trial.Trial]] = {each.name: [] for each in self.contenders}

        def once(each: Contender, first: bool) -> None:
            row = self.rows[each.name]
            if first:  # untimed: it warms up and measures memory
                with trial.PeakMemory(self.model.device) as peak:
                    cache = each.make(self.context + max(MEMORY_NEW, self.num_new))
                    trial.generate(self.model, prompt, cache, MEMORY_NEW)
                row.peak_bytes = peak.bytes
                held = self.context + MEMORY_NEW - 1  # the last token is never fed back
                row.bytes_per_token = stored_bytes(cache) / held
                row.held_bytes = held_bytes(cache)
            else:
                cache = each.make(self.context + self.num_new)
                trials[each.name].append(trial.generate(self.model, prompt, cache, self.num_new))

        for round_ in range(self.options.rounds + 1):
            if round_ > 1 and self.out_of_time(ROUNDS_SHARE):
                self.left_out.append(f"{round_ - 1} of {self.options.rounds} timed rounds")
                break
            self.num_rounds = round_
            for each in self.able:
                advance(f"generate: {each.name}")
                self.attempt(each, once, round_ == 0)
        for each in self.able:
            row, runs = self.rows[each.name], trials[each.name]
            row.tokens = runs[0].tokens
            row.text = self.decode(row.tokens)
            row.tokens_per_s = 1 / median(median(run.step_s) for run in runs)
            row.first_token_s = median(run.first_token_s for run in runs)
            wanted = self.rows[REFERENCE].tokens
            same = sum(a == b for a, b in zip(row.tokens, wanted, strict=True))
            row.agreement = same / len(wanted)

    def scores(self, advance: Advance) -> None:
        """Feed the same text through every cache: bits per byte and the logits' difference."""
        ids = self.ids[:, : self.context + SCORED_TOKENS]
        scored = self.decode(ids[0, self.context :])
        num_bytes = len(scored.encode())
        reference: list[torch.Tensor] = []

        def once(each: Contender) -> None:
            cache = each.make(ids.shape[1])
            result = trial.score(self.model, ids, cache, self.context)
            if not reference:
                reference.append(result.logits)
            row = self.rows[each.name]
            row.logit_difference = float((result.logits - reference[0]).abs().mean())
            row.bits_per_byte = result.nll / 0.6931471805599453 / num_bytes

        for each in self.able:
            advance(f"score a text: {each.name}")
            if not self.has_time(SCORE_SHARE, f"{each.name} was not scored"):
                continue
            self.attempt(each, once)

    def sweep(self, advance: Advance) -> list[SpeedPoint]:
        """Speed against context."""
        points = [
            SpeedPoint(
                name=row.name,
                context=self.context,
                tokens_per_s=row.tokens_per_s,
                first_token_s=row.first_token_s,
            )
            for row in self.rows.values()
            if row.tokens_per_s is not None and row.first_token_s is not None and not row.error
        ]

        def once(each: Contender, context: int) -> None:
            cache = each.make(context + SWEEP_NEW)
            run = trial.generate(self.model, self.ids[:, :context], cache, SWEEP_NEW)
            points.append(
                SpeedPoint(
                    name=each.name,
                    context=context,
                    tokens_per_s=1 / median(run.step_s),
                    first_token_s=run.first_token_s,
                )
            )

        for context in self.sweep_contexts():
            if self.out_of_time(SWEEP_SHARE):
                self.left_out.append(f"no speed with {context:,} tokens of context")
                continue
            for each in self.able:
                advance(f"{context:,} tokens of context: {each.name}")
                self.attempt(each, once, context)
        return sorted(points, key=lambda point: point.context)

    def distances(self) -> list[int]:
        """Recall distances within the context; none for a model with another vocabulary."""
        if self.loaded.name != BUNDLED_NAME:
            return []
        most = min(self.context, (self.limit or self.context) - RECALL_ROOM)
        return [distance for distance in RECALL_DISTANCES if distance <= most]

    def recall(self, advance: Advance) -> None:
        """Planted words asked for at growing distances, through every cache."""
        from mnemon.zoo.recall import recall_by_distance

        def once(each: Contender, distance: int) -> None:
            (point,) = recall_by_distance(
                self.model,
                self.tokenizer,
                distances=[distance],
                samples=RECALL_SAMPLES,
                filler=self.source.text[:RECALL_FILLER],
                make_cache=lambda config: each.make(distance + RECALL_ROOM),
            )
            self.rows[each.name].recall[distance] = point.accuracy

        for distance in self.distances():
            if self.out_of_time(RECALL_SHARE):
                self.left_out.append(f"no recall at {distance:,} tokens")
                continue
            for each in self.able:
                advance(f"recall at {distance:,} tokens: {each.name}")
                self.attempt(each, once, distance)

    def decode(self, ids: Any) -> str:
        """Token ids as text."""
        return str(self.tokenizer.decode(ids))

    def num_pieces(self) -> int:
        """How often `advance` is called, for the progress bar."""
        per_cache = self.options.rounds + 2 + len(self.sweep_contexts()) + len(self.distances())
        return per_cache * len(self.contenders) + self.options.rounds + 4


def run(
    loaded: LoadedModel,
    source: Source,
    options: DemoOptions,
    *,
    progress: Callable[[int], Advance] | None = None,
) -> DemoResult:
    """Measure everything the demo shows.

    Args:
        loaded: a decoder-only model and its tokenizer.
        source: the text; its first tokens are the prompt.
        options: context, new tokens, rounds.
        progress: given the number of pieces of work, returns what is called before each of them.

    Returns:
        The measurements.

    Raises:
        InputError: the text or the model is too short for the comparison.
    """
    import torch

    start = time.perf_counter()
    if loaded.model.config.is_encoder_decoder:
        raise InputError(
            f"{loaded.name} is an encoder-decoder model; the demo continues a text and needs a "
            "decoder-only one. `mnemon generate` and `mnemon bench` take both."
        )
    demo = Demo(loaded, source, options)
    calm_down(demo.notes)
    advance = progress(demo.num_pieces()) if progress else (lambda what: None)
    with torch.inference_mode(False), torch.no_grad():
        demo.main_rounds(advance)
        demo.scores(advance)
        reuse = (
            demo_reuse.reuse(demo, advance)
            if demo.has_time(demo_reuse.SHARE, "no reuse of a prompt")
            else None
        )
        is_on = demo.has_time(demo_reuse.SHARE, "no prompt given twice")
        fed_twice = demo_reuse.fed_twice(demo, advance) if is_on else []
        speed = demo.sweep(advance)
        demo.recall(advance)
    prompt_end = demo.decode(demo.ids[0, demo.context - 60 : demo.context])
    return DemoResult(
        model=describe_model(loaded),
        source={"name": source.name, "tokens": demo.ids.shape[1], "characters": len(source.text)},
        settings={
            "context": demo.context,
            "new_tokens": demo.num_new,
            "rounds": demo.num_rounds,
            "recall_samples": RECALL_SAMPLES,
            "scored_tokens": SCORED_TOKENS,
            "limit": demo.limit,
        },
        environment=environment(),
        rows=list(demo.rows.values()),
        speed=speed,
        reuse=reuse,
        fed_twice=fed_twice,
        prompt_end=prompt_end,
        notes=demo.all_notes(),
        elapsed_s=time.perf_counter() - start,
    )


def calm_down(notes: list[str]) -> None:
    """Use one thread where others keep the processors busy.

    Threads that wait for one that is not running spin: on a full machine two are slower than one.
    """
    import torch

    now = environment()
    load, usable = now["load_average"], now["processors_usable"]
    if load is not None and load > 1.5 * usable and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        notes.append(f"The machine was busy (load {load} on {usable} processors): one thread ran.")


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The model in one line's worth of facts."""
    config = loaded.model.config.get_text_config(decoder=True)
    return {
        "name": loaded.name,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "layers": getattr(config, "num_hidden_layers", None),
        "kv_heads": getattr(config, "num_key_value_heads", None),
        "head_dim": getattr(config, "head_dim", None),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
    }
