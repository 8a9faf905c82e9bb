"""A learned schedule as a file: scores for each cache step and sublayer."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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

__all__ = ["Fields", "Router", "load_router", "place_of", "read_tensors", "write_tensors"]

_NEAR = 0.005  # timesteps are told in the model's dtype: bfloat16 has 8 bits


def place_of(timestep: float, timesteps: Sequence[float], what: str) -> int:
    """Where in the run that something was made for this timestep is.

    Raises:
        DiffusionError: nowhere.
    """
    distances = [abs(timestep - made) for made in timesteps]
    place = distances.index(min(distances))
    if distances[place] > _NEAR * abs(timesteps[place]) + 1e-6:
        near = ", ".join(f"{t:.4g}" for t in timesteps[:4])
        raise DiffusionError(
            f"the {what} was made for {len(timesteps)} steps at the timesteps {near}, ...; this "
            f"run has one at {timestep:.4g}: use the sampler and the number of steps that it was "
            "made for, or make another one"
        )
    return place


class Fields:
    """The description in a file: every field of the kind that is expected, or an error."""

    def __init__(self, fields: Mapping[str, Any], path: str) -> None:
        self._fields, self._path = fields, path

    def _get(self, name: str, good: Callable[[Any], bool], kind: str) -> Any:
        value = self._fields.get(name)
        if not good(value):
            shown = repr(value)[:60]
            raise DiffusionError(f"{self._path}: {name} should be {kind}, it is {shown}")
        return value

    def text(self, name: str) -> str:
        """A string."""
        found: str = self._get(name, lambda v: isinstance(v, str), "a text")
        return found

    def whole(self, name: str) -> int:
        """A whole number from 1 on."""
        found: int = self._get(name, lambda v: type(v) is int and v > 0, "a whole number")
        return found

    def number(self, name: str) -> float:
        """A finite number."""
        return float(self._get(name, _is_number, "a finite number"))

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Puts the path before the message of an error, unless it is there already."""
        try:
            yield
        except DiffusionError as error:
            if str(error).startswith(self._path):
                raise
            raise DiffusionError(f"{self._path}: {error}") from None

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._fields

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        good = self._get(
            name, lambda v: isinstance(v, list) and all(map(_is_number, v)), "a list of numbers"
        )
        return tuple(map(float, good))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(
            self._get(
                name,
                lambda v: isinstance(v, list) and all(isinstance(part, str) for part in v),
                "a list of texts",
            )
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """Scores of a Learning-to-Cache schedule.

    Args:
        scores: one row per cache step (the odd ones: 1, 3, ...), one column per sublayer; the
            sigmoid of a score is how much that sublayer should be computed there.
        threshold: above which a sigmoid means "compute".
        num_steps: of the runs that it was trained for.
        timesteps: of these runs, as the model is told them: others are refused. Without them a run
            is only checked for its number of steps, where a scheduler says it.
        model: the class of the transformer.
        paths: the sublayers' names, in the order of the columns.
    """

    scores: Float[Tensor, "cache_steps sublayers"]
    threshold: float
    num_steps: int
    model: str
    paths: tuple[str, ...]
    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expected = (self.num_steps // 2, len(self.paths))
        if tuple(self.scores.shape) != expected:
            raise DiffusionError(
                f"scores of shape {tuple(self.scores.shape)} came; {self.num_steps} steps and "
                f"{len(self.paths)} sublayers need {expected}"
            )
        if self.timesteps and len(self.timesteps) != self.num_steps:
            raise DiffusionError(f"{len(self.timesteps)} timesteps came for {self.num_steps} steps")
        if not math.isfinite(self.threshold):
            raise DiffusionError(f"threshold={self.threshold} came; a finite number was expected")
        if not bool(torch.isfinite(self.scores).all()):
            raise DiffusionError("a router's scores have to be finite; some of these are not")

    def __str__(self) -> str:
        share = sum(map(sum, self.computes())) / max(1, self.scores.numel())
        return f"router of {self.num_steps} steps, {share:.0%} of cache steps computed"

    def computes(self, threshold: float | None = None) -> list[list[bool]]:
        """Whether each sublayer is computed, by cache step."""
        bar = self.threshold if threshold is None else threshold
        shares = self.scores.double().sigmoid()
        # At 0 everything is computed, also where a sigmoid is too small for a number.
        found: list[list[bool]] = (shares >= bar if bar <= 0 else shares > bar).tolist()
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
            timesteps=self.timesteps,
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
                "timesteps": list(self.timesteps),
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
    with fields.naming():
        return Router(
            scores=found["scores"].float(),
            threshold=fields.number("threshold"),
            num_steps=fields.whole("num_steps"),
            timesteps=fields.numbers("timesteps") if fields.has("timesteps") else (),
            model=fields.text("model"),
            paths=fields.texts("paths"),
        )


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
) -> tuple[dict[str, Tensor], Fields]:
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
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise DiffusionError(f"{shown}: {name} is of {tensor.dtype}, not of a real dtype")
    return found, Fields(fields, shown)
