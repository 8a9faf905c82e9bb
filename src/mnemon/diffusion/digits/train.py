"""Train the bundled DiT: ``python -m mnemon.diffusion.digits.train --out DIR``.

A run checkpoints every minute; ``--resume`` goes on where the last checkpoint stood. A step's
images and noise depend on nothing but the seed and the step.

``--experts 8 --moe diffmoe --objective flow`` trains a mixture of experts. Several processes share
a batch: ``torchrun --nproc-per-node 2 -m mnemon.diffusion.digits.train --out DIR``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from mnemon.diffusion.diffmoe import KINDS, auxiliary_loss, install, save_moe, set_training
from mnemon.diffusion.diffmoe.ranks import process_group
from mnemon.diffusion.digits.architecture import SIZES
from mnemon.diffusion.digits.trainer import Trainer, TrainOptions

__all__ = ["main", "make_trainer"]


def make_trainer(options: TrainOptions) -> Trainer:
    """A trainer of the dense model, or of one with the experts that the options name."""
    if not options.experts:
        return Trainer(options)

    def prepare(model: nn.Module) -> None:
        install(model, options.moe, num_experts=options.experts, seed=options.seed)
        set_training(model)

    return Trainer(options, prepare=prepare, auxiliary=auxiliary_loss, write=save_moe)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mnemon.diffusion.digits.train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--objective", choices=["epsilon", "flow"], default="epsilon")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--experts", type=int, default=0, help="0: a dense model")
    parser.add_argument("--moe", choices=list(KINDS), default="diffmoe", help="with --experts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="write pipeline/ and stop")
    given = vars(parser.parse_args(arguments))
    resume, export_only = given.pop("resume"), given.pop("export_only")
    with process_group():
        trainer = make_trainer(TrainOptions(**given))
        if resume or export_only:
            trainer.load()
        if not export_only:
            trainer.run()
        elif trainer.rank == 0:
            trainer.export(given["out"] / "pipeline")


if __name__ == "__main__":
    main()
