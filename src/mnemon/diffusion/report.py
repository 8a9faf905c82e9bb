"""What a cache saved, in evaluations, multiply-accumulates, seconds and bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mnemon.diffusion.macs import Macs, count_macs, shapes_of
from mnemon.diffusion.sites import Sites

if TYPE_CHECKING:
    from mnemon.diffusion.methods.base import Method

__all__ = ["Report", "Tally"]


@dataclass(slots=True, kw_only=True)
class _Shaped:
    """Evaluations with arguments of one shape: how many, and what they computed in sum."""

    arguments: Any
    sublayers: list[float]
    blocks: list[float]
    count: int = 0


class Tally:
    """Counts of one transformer.

    Attributes:
        runs: denoising runs begun.
        evaluations: calls of the transformer.
        computed: per sublayer, evaluations that computed it; a token-wise method adds the share of
            tokens.
        seconds: within the transformer's forward.
        peak_bytes: of features kept between two evaluations.
    """

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.runs = self.evaluations = self.peak_bytes = 0
        self.seconds = 0.0
        self.computed = [0.0] * len(sites.sublayers)
        self.schedule: list[tuple[float, ...]] = []  # of the latest run, by evaluation
        self._shape: Any = None
        self._by_shape: dict[Any, _Shaped] = {}
        self._counted: dict[Any, Macs | None] = {}
        self._model: nn.Module | None = None

    def begin(
        self, new_run: bool, model: nn.Module, arguments: Mapping[str, Any], key: Any
    ) -> None:
        """An evaluation begins."""
        if new_run:
            self.runs += 1
            self.schedule = []
        self._model, self._shape = model, key
        if key not in self._by_shape:
            self._by_shape[key] = _Shaped(
                arguments=shapes_of(arguments),
                sublayers=[0.0] * len(self.computed),
                blocks=[0.0] * len(self.sites.blocks),
            )

    def add(self, computed: Sequence[float], ran: Sequence[float], seconds: float) -> None:
        """An evaluation ran through."""
        self.evaluations += 1
        self.seconds += seconds
        self.schedule.append(tuple(computed))
        found = self._by_shape[self._shape]
        found.count += 1
        for number, share in enumerate(computed):
            self.computed[number] += share
            found.sublayers[number] += share
        for number, share in enumerate(ran):
            found.blocks[number] += share

    def held(self, size: int) -> None:
        """So many bytes are kept after an evaluation."""
        self.peak_bytes = max(self.peak_bytes, size)

    def macs(self) -> tuple[int, int] | None:
        """Multiply-accumulates spent, and what the same evaluations cost without a cache.

        Where lengths depend on a mask's values (Lumina 2), those of the first evaluation with
        arguments of these shapes count. None if the model's cannot be counted at all.
        """
        spent = whole = 0
        for key, found in self._by_shape.items():
            counted = self._count(key, found.arguments)
            if counted is None:
                return None
            whole += counted.total * found.count
            outside = (counted.total - sum(counted.blocks)) * (found.count - 1)
            spent += outside + counted.spent(found.blocks, found.sublayers)
        return spent, whole

    def _count(self, key: Any, arguments: Any) -> Macs | None:
        if key not in self._counted:
            assert self._model is not None
            if any(getattr(module, "needs_batch", False) for module in self._model.modules()):
                return None  # what experts compute depends on what they are given
            try:
                self._counted[key] = count_macs(self._model, self.sites, arguments)
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                self._counted[key] = None  # it branches on values: there is nothing to count with
        return self._counted[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was computed and what was reused.

    Args:
        method: the method attached.
        tallies: by name of the transformer in its pipeline.
    """

    method: Method
    tallies: Mapping[str, Tally]

    @property
    def evaluations(self) -> int:
        """Calls of the transformers."""
        return sum(t.evaluations for t in self.tallies.values())

    @property
    def runs(self) -> int:
        """Denoising runs."""
        return sum(t.runs for t in self.tallies.values())

    @property
    def seconds(self) -> float:
        """Spent in the transformers; on an accelerator, issuing their work."""
        return sum(t.seconds for t in self.tallies.values())

    @property
    def computed_share(self) -> float:
        """Sublayer evaluations that were computed, of all, token-wise ones by share; 0 to 1."""
        done = sum(sum(t.computed) for t in self.tallies.values())
        whole = sum(len(t.computed) * t.evaluations for t in self.tallies.values())
        return done / whole if whole else 0.0

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates spent; None where they cannot be counted."""
        counted = [t.macs() for t in self.tallies.values()]
        return None if None in counted else sum(c[0] for c in counted if c)

    @property
    def macs_uncached(self) -> int | None:
        """What the same evaluations cost without a cache; None where they cannot be counted."""
        counted = [t.macs() for t in self.tallies.values()]
        return None if None in counted else sum(c[1] for c in counted if c)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of features kept at a time."""
        return sum(t.peak_bytes for t in self.tallies.values())

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, for JSON."""
        return {
            "method": str(self.method),
            "runs": self.runs,
            "evaluations": self.evaluations,
            "computed_share": self.computed_share,
            "macs": self.macs,
            "macs_uncached": self.macs_uncached,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "sublayers": {
                f"{name}.{s.path}": {"computed": c, "reused": t.evaluations - c}
                for name, t in self.tallies.items()
                for s, c in zip(t.sites.sublayers, t.computed, strict=True)
            },
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.method}: {self.runs} runs, {self.evaluations} evaluations")
        table.add_column("sublayers")
        for heading in ("computed", "reused", "share"):
            table.add_column(heading, justify="right")
        for tally in self.tallies.values():
            rows: dict[str, list[float]] = {}
            for sublayer, computed in zip(tally.sites.sublayers, tally.computed, strict=True):
                name = sublayer.path.rsplit(".", 1)[-1]
                stack = sublayer.path.split(".", 1)[0]
                rows.setdefault(f"{stack}.*.{name}", []).append(computed)
            for name, counts in rows.items():
                whole = len(counts) * tally.evaluations
                done = sum(counts)
                share = f"{done / whole:.0%}" if whole else "-"
                table.add_row(name, f"{done:,.4g}", f"{whole - done:,.4g}", share)
        macs, whole_macs = self.macs, self.macs_uncached
        if macs is not None and whole_macs:
            table.add_section()
            table.add_row(
                "multiply-accumulates",
                _si(macs),
                _si(whole_macs - macs),
                f"{macs / whole_macs:.0%}",
            )
        table.caption = (
            f"{self.seconds:.3g} s in the transformer, up to {_size(self.peak_bytes)} kept"
        )
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        return out.getvalue().rstrip("\n")


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
