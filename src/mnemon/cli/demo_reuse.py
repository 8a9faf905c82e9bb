"""Two comparisons of the demo that are about reuse: a long prompt again, and a prompt fed twice."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mnemon.cli import trial
from mnemon.cli.contenders import held_tokens
from mnemon.cli.demo_result import FedTwice, Reuse

if TYPE_CHECKING:
    from mnemon.cli.demo_run import Advance, Demo

__all__ = ["SHARE", "fed_twice", "reuse"]

REUSE_NEW = 16
REUSE_TAIL = 32
SHARE = 0.75  # of the demo's time, after which no further round is taken
TWICE_PROMPTS, TWICE_PROMPT, TWICE_NEW = 4, 32, 16


def reuse(demo: Demo, advance: Advance) -> Reuse:
    """Time to the first token of a long prompt: fresh, kept in memory, loaded from a file."""
    import mnemon

    shared = demo.context
    prompt = demo.ids[:, : shared + REUSE_TAIL]
    fresh: list[trial.Trial] = []
    kept: list[trial.Trial] = []
    loaded: list[trial.Trial] = []
    with mnemon.attach(demo.model), tempfile.TemporaryDirectory(prefix="mnemon-") as folder:
        advance("prefix reuse: compute and save the prompt")
        saved = mnemon.Cache(demo.model.config)
        mnemon.prefill(demo.model, prompt[:, :shared], saved)
        num_reused = saved.common_prefix(prompt.cpu())
        path = Path(folder) / "prompt.safetensors"
        start = time.perf_counter()
        saved.save(path, model=demo.model)
        save_s = time.perf_counter() - start
        for round_ in range(demo.options.rounds):
            if round_ and demo.out_of_time(SHARE):
                break
            advance("prefix reuse: fresh, kept, loaded")
            cache = mnemon.Cache(demo.model.config)
            fresh.append(trial.generate(demo.model, prompt, cache, REUSE_NEW))
            kept.append(trial.generate(demo.model, prompt, saved.fork(), REUSE_NEW))
            start = time.perf_counter()
            cache = mnemon.load_cache(path, demo.model)
            load_s = time.perf_counter() - start
            run = trial.generate(demo.model, prompt, cache, REUSE_NEW)
            loaded.append(
                trial.Trial(
                    tokens=run.tokens,
                    first_token_s=load_s + run.first_token_s,
                    step_s=run.step_s,
                )
            )
        del cache  # a mapped file must be closed before Windows can delete it
        size = path.stat().st_size
    runs = [*fresh, *kept, *loaded]
    return Reuse(
        num_prompt=prompt.shape[1],
        num_shared=shared,
        num_reused=num_reused,
        fresh_s=[run.first_token_s for run in fresh],
        kept_s=[run.first_token_s for run in kept],
        loaded_s=[run.first_token_s for run in loaded],
        file_bytes=size,
        save_s=save_s,
        same_tokens=all(run.tokens == runs[0].tokens for run in runs),
    )


def fed_twice(demo: Demo, advance: Advance) -> list[FedTwice]:
    """Give `generate` prompts that the cache already holds, in both libraries."""
    reference, *rest = demo.contenders
    ours = next(each for each in rest if each.attached)
    room = TWICE_PROMPT + TWICE_NEW
    step = demo.context // TWICE_PROMPTS
    prompts = [demo.ids[:, i * step :][:, :TWICE_PROMPT] for i in range(TWICE_PROMPTS)]
    advance("prompts that are already cached")
    right = [
        trial.generate(demo.model, ids, reference.make(room), TWICE_NEW).tokens for ids in prompts
    ]
    results = []
    for each in (reference, ours):
        advance(f"prompts that are already cached: {each.name}")
        error, answers = "", list[list[int]]()
        num_held: int | None = None
        try:
            with each.session(demo.model):
                for ids in prompts:
                    cache = each.make(room)
                    trial.generate(demo.model, ids, cache, 1)  # now it holds the prompt
                    answers.append(trial.generate(demo.model, ids, cache, TWICE_NEW).tokens)
                    num_held = held_tokens(cache)
        except Exception as raised:  # whatever happens is the result
            error = f"{type(raised).__name__}: {raised}"
        same = [answer == wanted for answer, wanted in zip(answers, right, strict=False)]
        shown = same.index(False) if False in same else 0
        results.append(
            FedTwice(
                name=each.name,
                num_prompt=TWICE_PROMPT,
                num_prompts=TWICE_PROMPTS,
                num_same=sum(same),
                num_held=num_held,
                num_right=room - 1,  # the last token is never fed back
                text=demo.decode(answers[shown]) if answers else "",
                right_text=demo.decode(right[shown]),
                error=error,
            )
        )
    return results
