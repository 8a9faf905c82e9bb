"""What verification found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Case", "Report", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Case:
    """One shape that is tried.

    Args:
        batch: rows.
        past: tokens fed before.
        query: tokens of the call.
        source: of the encoder; 0 without one.
        strided: the cache's tensors do not lie in one piece.
        made_by: who made what is cached: "model"; "export": the export itself, call after call,
            then fed `steps` calls of `query` tokens; "random": numbers of a long past.
        steps: calls that are compared.
    """

    batch: int
    past: int
    query: int
    source: int = 0
    strided: bool = False
    made_by: str = "model"
    steps: int = 1

    def __str__(self) -> str:
        ending = f", source {self.source}" if self.source else ""
        how = ", strided" if self.strided else ""
        how += f", {self.steps} steps on what the export made" if self.made_by == "export" else ""
        how += ", random past" if self.made_by == "random" else ""
        return f"batch {self.batch}, past {self.past}, query {self.query}{ending}{how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one shape.

    Args:
        case: the shape.
        status: "right", "wrong", "refused" (an error said so), "crashed" (the process died) or
            "late" (out of time).
        logits: largest difference from the model's own logits.
        cache: largest difference from the model's own cache.
        tolerance: what was allowed.
        reason: of a refusal.
    """

    case: Case
    status: str
    logits: float = 0.0
    cache: float = 0.0
    tolerance: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What was tried against the model, shape by shape; empty if nothing was."""

    verdicts: tuple[Verdict, ...] = ()

    @property
    def largest_difference(self) -> float:
        """Over all shapes that ran, logits and cache."""
        ran = [one for one in self.verdicts if one.status in ("right", "wrong")]
        return max((max(one.logits, one.cache) for one in ran), default=0.0)

    @property
    def num_right(self) -> int:
        """Shapes that gave the model's numbers."""
        return sum(one.status == "right" for one in self.verdicts)

    @property
    def wrong(self) -> list[Verdict]:
        """Shapes that gave other numbers."""
        return [one for one in self.verdicts if one.status == "wrong"]

    @property
    def refused(self) -> list[Verdict]:
        """Shapes that do not run, with the reason."""
        return [one for one in self.verdicts if one.status not in ("right", "wrong")]

    def __str__(self) -> str:
        if not self.verdicts:
            return "not verified"
        lines = [
            f"{self.num_right} of {len(self.verdicts)} shapes give the model's numbers; largest "
            f"difference {self.largest_difference:.2g}"
        ]
        lines += [f"{one.status}: {one.case}: {one.reason}" for one in self.refused]
        lines += [
            f"wrong: {one.case}: logits off by {one.logits:.3g}, cache by {one.cache:.3g}"
            for one in self.wrong
        ]
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-able facts."""
        return [asdict(one) for one in self.verdicts]

    @classmethod
    def from_json(cls, facts: list[Mapping[str, Any]]) -> "Report":
        """The reverse of `to_json`."""
        return cls(tuple(Verdict(**{**one, "case": Case(**one["case"])}) for one in facts))
