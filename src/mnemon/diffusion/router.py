"""A learned schedule as a file: scores for each cache step and sublayer."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor

from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError
from mnemon.files.atomic import write_atomically

__all__ = ["Router", "load_router", "read_tensors", "write_tensors"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """Scores of a Learning-to-Cache schedule.

    Args:
        scores: one row per cache step (the odd ones: 1, 3, ...), one column per sublayer; the
            sigmoid of a score is how much that sublayer should be computed there.
        threshold: above which a sigmoid means "compute".
        num_steps: of the runs that it was trained for.
        model: the class of the transformer.
        paths: the sublayers' names, in the order of the columns.
    """

    scores: Float[Tensor, "cache_steps sublayers"]
    threshold: float
    num_steps: int
    model: str
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = (self.num_steps // 2, len(self.paths))
        if tuple(self.scores.shape) != expected:
            raise DiffusionError(
                f"scores of shape {tuple(self.scores.shape)} came; {self.num_steps} steps and "
                f"{len(self.paths)} sublayers need {expected}"
            )
        if not bool(torch.isfinite(self.scores).all()):
            raise DiffusionError("a router's scores have to be finite; some of these are not")

    def __str__(self) -> str:
        share = sum(map(sum, self.computes())) / max(1, self.scores.numel())
        return f"router of {self.num_steps} steps, {share:.0%} of cache steps computed"

    def computes(self, threshold: float | None = None) -> list[list[bool]]:
        """Whether each sublayer is computed, by cache step."""
        bar = self.threshold if threshold is None else threshold
        found: list[list[bool]] = (self.scores.double().sigmoid() > bar).tolist()
        return found

    def with_share(self, share: float) -> Router:
        """The same scores, with the threshold at which this share of sublayers is computed.

        Args:
            share: 0 to 1, of the cache steps'; what is computed is rounded to a whole number, and
                more where scores are equal.
        """
        count = round(share * self.scores.numel())
        ordered = self.scores.double().sigmoid().flatten().sort(descending=True).values
        if count >= len(ordered):
            threshold = -1.0
        elif count == 0:
            threshold = 1.0
        else:
            threshold = float(ordered[count - 1] + ordered[count]) / 2
            if threshold >= float(ordered[count - 1]):
                threshold = math.nextafter(float(ordered[count - 1]), 0.0)
        return Router(
            scores=self.scores,
            threshold=threshold,
            num_steps=self.num_steps,
            model=self.model,
            paths=self.paths,
        )

    def check(self, sites: Sites) -> None:
        """Refuses another model.

        Raises:
            DiffusionError: says what differs.
        """
        came = tuple(s.path for s in sites.sublayers)
        if sites.model != self.model or came != self.paths:
            raise DiffusionError(
                f"the router is of a {self.model} with {len(self.paths)} sublayers, this is a "
                f"{sites.model} with {len(came)}; train one for it"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        write_tensors(
            path,
            {"scores": self.scores.detach().float().contiguous()},
            kind="l2c-router",
            fields={
                "threshold": self.threshold,
                "num_steps": self.num_steps,
                "model": self.model,
                "paths": list(self.paths),
            },
        )


def load_router(path: str | os.PathLike[str]) -> Router:
    """Reads a router.

    Raises:
        DiffusionError: no router is there, or not a whole one.
    """
    found, fields = read_tensors(path, kind="l2c-router", names=("scores",))
    try:
        return Router(
            scores=found["scores"].float(),
            threshold=float(fields["threshold"]),
            num_steps=int(fields["num_steps"]),
            model=str(fields["model"]),
            paths=tuple(map(str, fields["paths"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DiffusionError):
            raise DiffusionError(f"{os.fspath(path)}: {error}") from None
        raise DiffusionError(
            f"{os.fspath(path)}: its description lacks or garbles {error}; train it again"
        ) from None


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], *, kind: str, fields: dict[str, Any]
) -> None:
    """A safetensors file of this kind with these fields, written whole or not at all."""
    from safetensors.torch import save

    metadata = {"format": f"mnemon-{kind}", "fields": json.dumps(fields)}
    data = save(tensors, metadata)
    write_atomically(Path(path).expanduser(), lambda writer: writer.write(data))


def read_tensors(
    path: str | os.PathLike[str], *, kind: str, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        DiffusionError: no such file, another kind of file, or a damaged one.
    """
    shown = os.fspath(path)
    try:
        with safetensors.safe_open(Path(path).expanduser(), "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise DiffusionError(
            f"{shown}: cannot be read as a mnemon-{kind} file ({error}); check the path"
        ) from None
    if metadata.get("format") != f"mnemon-{kind}" or any(name not in found for name in names):
        raise DiffusionError(
            f"{shown}: this is a safetensors file, but no mnemon-{kind}; check the path"
        )
    try:
        fields = json.loads(metadata["fields"])
    except (KeyError, ValueError):
        fields = None
    if not isinstance(fields, dict):
        raise DiffusionError(f"{shown}: its description is damaged; make the file again")
    return found, fields
