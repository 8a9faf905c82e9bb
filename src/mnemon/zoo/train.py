"""Train the bundled model: ``python -m mnemon.zoo.train --out DIR --minutes 90``.

The run learns a tokenizer, then follows the length curriculum of `schedule` on the rows
of `tasks`. It checkpoints every few minutes and ``--resume`` goes on exactly where the
last checkpoint stood: a step's rows depend on nothing but the seed and the step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mnemon.zoo.schedule import Budget
from mnemon.zoo.trainer import Trainer, TrainOptions


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mnemon.zoo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-scale", type=int, default=1, help="rows per step, times this")
    parser.add_argument("--matrix-lr", type=float, default=3e-3)
    parser.add_argument("--other-lr", type=float, default=5e-3)
    parser.add_argument(
        "--plain-init", action="store_true", help="random weights only, no induction circuit"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="write model/ and stop")
    given = parser.parse_args(arguments)
    options = TrainOptions(
        out=given.out,
        budget=Budget(num_tokens=given.tokens, minutes=given.minutes),
        seed=given.seed,
        device=given.device,
        batch_scale=given.batch_scale,
        matrix_lr=given.matrix_lr,
        other_lr=given.other_lr,
        wired=not given.plain_init,
    )
    trainer = Trainer(options)
    if given.resume or given.export_only:
        trainer.load()
    if given.export_only:
        trainer.export(given.out / "model")
    else:
        trainer.run()


if __name__ == "__main__":
    main()
