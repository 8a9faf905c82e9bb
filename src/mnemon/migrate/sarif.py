"""SARIF 2.1.0: findings as code scanners and editors read them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mnemon.migrate.loading import EXTRA_RULES
from mnemon.migrate.model import FileResult, Finding, Place, Status
from mnemon.migrate.rules import RULES
from mnemon.migrate.target import Target
from mnemon.names import NAMES

__all__ = ["sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(results: Iterable[FileResult], target: Target, version: str) -> dict[str, Any]:
    """One run of the codemod as a SARIF log.

    Columns count characters, from 1. Places in notebooks are told in the message, as SARIF has
    none for a cell.

    Args:
        results: of every file that was looked at.
        target: what it was migrated to.
        version: of mnemon.
    """
    rules = _rules()
    index = {rule["id"]: at for at, rule in enumerate(rules)}
    found: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for result in results:
        found += [_result(result, finding, index) for finding in result.findings]
        for problem in result.problems:
            location = _location(result.path, problem.place)
            notes.append(
                {"level": "error", "message": {"text": problem.message}, "locations": [location]}
            )
    driver = {
        "name": "mnemon migrate",
        "version": version,
        "semanticVersion": version,
        "rules": rules,
    }
    invocation = {"executionSuccessful": not notes, "toolExecutionNotifications": notes}
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "unicodeCodePoints",
        "properties": {"target": f"transformers {target.version}"},
        "results": found,
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rules() -> list[dict[str, Any]]:
    used = {key for rule in RULES for key in rule.keys}
    return [
        {
            "id": name.key,
            "name": "".join(part[:1].upper() + part[1:] for part in re.findall(r"\w+", name.key)),
            "shortDescription": {"text": name.spelling},
            "fullDescription": {"text": name.meaning},
            "help": {"text": f"Write `{name.modern}`. {name.meaning}"},
            "defaultConfiguration": {"level": "warning"},
        }
        for name in NAMES
        if name.key in used
    ] + [
        {
            "id": key,
            "shortDescription": {"text": old},
            "fullDescription": {"text": why},
            "help": {"text": f"Write `{modern}`. {why}"},
            "defaultConfiguration": {"level": "warning"},
        }
        for key, (old, modern, why) in EXTRA_RULES.items()
    ]


def _result(result: FileResult, finding: Finding, index: dict[str, int]) -> dict[str, Any]:
    place = finding.place
    where = "" if place.cell is None else f"cell {place.cell}, line {place.line}: "
    entry: dict[str, Any] = {
        "ruleId": finding.rule,
        "level": "warning" if finding.status is Status.REWRITTEN else "note",
        "message": {"text": where + finding.message},
        "locations": [_location(result.path, place)],
        "properties": {"status": finding.status.value},
    }
    if finding.rule in index:
        entry["ruleIndex"] = index[finding.rule]
    replacement = finding.replacement
    if replacement is not None and place.cell is None:
        change = {
            "artifactLocation": {"uri": _uri(result.path)},
            "replacements": [
                {
                    "deletedRegion": _region(replacement.place),
                    "insertedContent": {"text": replacement.text},
                }
            ],
        }
        entry["fixes"] = [{"description": {"text": finding.message}, "artifactChanges": [change]}]
    return entry


def _location(path: str, place: Place | None) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(path)}}
    if place is not None and place.cell is None:
        physical["region"] = _region(place)
    return {"physicalLocation": physical}


def _region(place: Place) -> dict[str, int]:
    return {
        "startLine": place.line,
        "startColumn": place.column,
        "endLine": place.end_line,
        "endColumn": place.end_column,
    }


def _uri(path: str) -> str:
    """Relative to where the command ran, which is where a scanner has its root."""
    if path == "-":
        return "stdin"
    relative = os.path.relpath(path)
    if relative.startswith(".."):
        return Path(path).absolute().as_uri()
    return quote(Path(relative).as_posix())
