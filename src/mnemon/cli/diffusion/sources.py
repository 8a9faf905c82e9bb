"""The pipeline that a command was asked for, and checks of what else it was asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mnemon.errors import DiffusionError, FileError

__all__ = ["Device", "Loaded", "Pipe", "Pipes", "Threads", "check_file", "load", "load_all"]

_PIPE_HELP = "Folder of a saved DiTPipeline; nothing for the bundled one."
Pipe = Annotated[Path | None, typer.Argument(metavar="[PIPE]", help=_PIPE_HELP)]
Pipes = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PIPE", help=f"{_PIPE_HELP} Several are training seeds."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; torch's choice if unset.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A pipeline, ready to run.

    Args:
        name: a short name for tables.
        pipe: a diffusers `DiTPipeline` in float32.
        folder: where it was read from, and where its router and plans are looked for.
        num_classes: that it was trained on.
        digits: it draws what the classifier of digits can judge.
    """

    name: str
    pipe: Any
    folder: Path
    num_classes: int
    digits: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        config = self.pipe.transformer.config
        return {
            "name": self.name,
            "parameters": sum(p.numel() for p in self.pipe.transformer.parameters()),
            "blocks": config.num_layers,
            "width": config.num_attention_heads * config.attention_head_dim,
            "tokens": (config.sample_size // config.patch_size) ** 2,
            "sampler": type(self.pipe.scheduler).__name__,
            "digits": self.digits,
        }


def load(path: Path | None, *, device: str = "auto", threads: int | None = None) -> Loaded:
    """Loads a pipeline.

    Raises:
        ZooError: there is none at `path`, or this installation has no bundled one.
        DiffusionError: it is a pipeline of another class, or cannot be read.
        DependencyError: diffusers is not installed.
    """
    import torch

    from mnemon.cli.models import parse_device
    from mnemon.diffusion.digits import bundled_path, load_pipeline
    from mnemon.diffusion.digits.data import CLASSES, SIDE

    where = parse_device(device)
    folder = bundled_path() if path is None else path.expanduser()
    _check_class(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        pipe = load_pipeline(folder)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise DiffusionError(f"{folder}: cannot be loaded ({line}); save it again") from error
    if where.type != "cpu":
        pipe.to(where)
    config = pipe.transformer.config
    digits = (config.in_channels, config.sample_size, config.patch_size) == (1, SIDE, 1)
    return Loaded(
        name=_name(folder),
        pipe=pipe,
        folder=folder,
        num_classes=CLASSES if digits else config.num_embeds_ada_norm,
        digits=digits,
    )


def _check_class(folder: Path) -> None:
    """Says what is wrong before diffusers does; a missing file is left to `load_pipeline`."""
    index = folder / "model_index.json"
    if not index.is_file():
        return
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise DiffusionError(f"{index}: damaged; save the pipeline again") from error
    if kind != "DiTPipeline":
        raise DiffusionError(
            f"{os.fspath(folder)} holds a {kind}; this command takes a DiTPipeline (any other is "
            "served by mnemon.diffusion.attach)"
        )


def _name(folder: Path) -> str:
    full = folder.resolve()
    return full.parent.name if full.name == "pipeline" else full.name


def load_all(
    paths: Sequence[Path] | None, *, device: str = "auto", threads: int | None = None
) -> list[Loaded]:
    """Loads several, or the bundled one.

    Raises:
        DiffusionError: some are of digits and some are not: no classifier serves both.
    """
    wanted: Sequence[Path | None] = paths or [None]
    found = [load(path, device=device, threads=threads) for path in wanted]
    if len({(loaded.digits, loaded.num_classes) for loaded in found}) > 1:
        raise DiffusionError("several pipelines have to draw the same things; these do not")
    return found


def check_file(path: Path) -> None:
    """Fails before minutes of work, not after.

    Raises:
        FileError: no file can be written there.
    """
    target = path.expanduser()
    if target.is_dir():
        raise FileError(f"{target} is a directory; choose the path of a file")
    if not target.parent.is_dir():
        raise FileError(f"the directory {target.parent} does not exist; create it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise FileError(f"{target} cannot be written; choose another path")
