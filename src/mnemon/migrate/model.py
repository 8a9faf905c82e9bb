"""What a migration finds and says: findings, their places, and the result of one file."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, final

__all__ = ["FileResult", "Finding", "Place", "Problem", "Replacement", "Status"]


class Status(StrEnum):
    """What became of a place where an old name is used."""

    REWRITTEN = "rewritten"
    UNDECIDED = "undecided"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something stands: lines and columns from 1, columns in characters.

    Args:
        line: the line; within the cell for a notebook.
        column: the first character.
        end_line: the line of the last character.
        end_column: one past the last character.
        cell: the notebook's cell, from 1; None in a plain file.
    """

    line: int
    column: int
    end_line: int
    end_column: int
    cell: int | None = None

    def __str__(self) -> str:
        return f"{self.line}" if self.cell is None else f"cell {self.cell}, line {self.line}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One stretch of text and what stands there instead."""

    place: Place
    text: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One use of an old name.

    Args:
        rule: key of the name in `mnemon.names`.
        status: whether it was rewritten.
        place: where it stands in the original file.
        message: what was done, or why it could not be decided.
        replacement: the edit, for what was rewritten.
    """

    rule: str
    status: Status
    place: Place
    message: str
    replacement: Replacement | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A file, or a cell, that could not be read as Python."""

    message: str
    place: Place | None = None


@final
@dataclass(slots=True, kw_only=True)
class FileResult:
    """What a migration found in one file.

    Args:
        path: as it was given or found.
        before: the file's text as bytes.
        after: the same with every rewrite applied; `before` where there is none.
        findings: in the order of the file.
        problems: what could not be read as Python, if anything.
        num_lines: lines of source looked at.
    """

    path: str
    before: bytes = b""
    after: bytes = b""
    findings: list[Finding] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    num_lines: int = 0

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def of(self, status: Status) -> list[Finding]:
        return [finding for finding in self.findings if finding.status is status]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the bytes, for JSON."""
        return {
            "path": self.path,
            "changed": self.changed,
            "findings": [_finding_dict(finding) for finding in self.findings],
            "problems": [
                {"message": problem.message, **_place_dict(problem.place)}
                for problem in self.problems
            ],
        }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    entry = {"rule": finding.rule, "status": finding.status.value, **_place_dict(finding.place)}
    entry["message"] = finding.message
    if finding.replacement is not None:
        entry["replacement"] = finding.replacement.text
    return entry


def _place_dict(place: Place | None) -> dict[str, Any]:
    if place is None:
        return {}
    found = {
        "line": place.line,
        "column": place.column,
        "end_line": place.end_line,
        "end_column": place.end_column,
    }
    return found if place.cell is None else {"cell": place.cell, **found}
