"""What `add_grc` has changed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

__all__ = ["Place", "Report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One self-attention that has a memory.

    Args:
        name: dotted name of the self-attention, in the model.
        kind: its class before.
        num_heads: heads.
        ratio: share of the channels that is kept; what was asked for, rounded to whole heads.
        kept: channels that are kept.
        memory_length: slots.
        num_parameters: added.
        buffer_bytes: of the memory.
    """

    name: str
    kind: str
    num_heads: int
    ratio: float
    kept: int
    memory_length: int
    num_parameters: int
    buffer_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `add_grc` has changed in one model; printed as a table.

    Args:
        model: the model's class.
        variant: "paper" or "repo".
        places: in the model's order.
        num_parameters_before: of the model without memories.
    """

    model: str
    variant: str
    places: tuple[Place, ...]
    num_parameters_before: int

    @property
    def num_parameters(self) -> int:
        """Parameters added."""
        return sum(place.num_parameters for place in self.places)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "model": self.model,
            "variant": self.variant,
            "num_parameters": self.num_parameters,
            "num_parameters_before": self.num_parameters_before,
            "places": [
                {name: getattr(place, name) for name in Place.__dataclass_fields__}
                for place in self.places
            ],
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"GRC ({self.variant}) in {self.model}")
        for heading in ("self-attention", "class"):
            table.add_column(heading, overflow="fold")
        for heading in ("heads", "ratio", "memory", "parameters"):
            table.add_column(heading, justify="right")
        for place in self.places:
            table.add_row(
                place.name,
                place.kind,
                str(place.num_heads),
                f"{place.ratio:.3g}",
                f"{place.memory_length} x {place.kept}",
                f"{place.num_parameters:,}",
            )
        share = self.num_parameters / max(1, self.num_parameters_before)
        table.add_section()
        table.add_row("all", "", "", "", "", f"{self.num_parameters:,} (+{share:.1%})")
        out = io.StringIO()
        Console(file=out, width=110).print(table)
        return out.getvalue().rstrip("\n")
