"""`mnemon memory listops`: what a gated recurrent cache brings on nested lists."""

from __future__ import annotations

from pathlib import Path

from mnemon.cli.memory import experiments
from mnemon.cli.memory.experiments import Arms, AsJson, Jobs, Out, Resume, Seeds, Size, Sizes, Steps


def command(
    seeds: Seeds = None,
    steps: Steps = None,
    arms: Arms = None,
    out: Out = Path("grc"),
    size: Size = Sizes.SMALL,
    jobs: Jobs = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a small transformer on ListOps, with and without a memory.

    Every arm is trained from the same seeds: without a memory, with GRC as in the paper and as in
    its public code, with as many parameters in a wider feed-forward, with the cache pinned at
    zero, with sigmoid(lambda) = 0, and with a first-in-first-out cache. What is printed is what
    was found, whatever its sign. An interrupted experiment goes on with --resume.

    Exit codes: 0 done; 1 an error, with a message; 2 wrong usage; 130 interrupted.
    """
    experiments.run(
        "listops",
        seeds=seeds,
        steps=steps,
        arms=arms,
        out=out,
        size=size,
        jobs=jobs,
        resume=resume,
        as_json=as_json,
    )
