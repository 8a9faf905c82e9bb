"""The matrix as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.table import Table

from .architectures import rows
from .cells import DIFFERENT, EQUAL, ERROR, NOT_APPLICABLE, Outcome
from .modes import MODES

Results = dict[tuple[str, str, bool], Outcome]
SIGNS = {EQUAL: "=", DIFFERENT: "≠", ERROR: "!", NOT_APPLICABLE: "-"}
STYLES = {EQUAL: "green", DIFFERENT: "bold red", ERROR: "bold red", NOT_APPLICABLE: "dim"}


def table(results: Results) -> Table:
    """One row per architecture; in each cell the plain cache and the attached one."""
    view = Table(
        title="Tokens of mnemon.Cache against transformers' default cache",
        caption="two signs per cell: alone, attached   = equal   ≠ different   ! error   "
        "- n/a: transformers' own cache raises",
    )
    view.add_column("architecture")
    view.add_column("family")
    for mode in MODES:
        view.add_column("\n".join(mode.split("_")), justify="center")
    for name, row in rows().items():
        if any(key[0] == name for key in results):
            signs = [_cell(results, name, mode) for mode in MODES]
            view.add_row(name, row.family, *signs)
    return view


def _cell(results: Results, name: str, mode: str) -> str:
    signs = []
    for attached in (False, True):
        outcome = results.get((name, mode, attached))
        if outcome is None:
            signs.append(" ")
        else:
            style = STYLES[outcome.kind]
            signs.append(f"[{style}]{SIGNS[outcome.kind]}[/{style}]")
    return "".join(signs)


def summary(results: Results) -> str:
    """Counts in one line."""
    kinds = Counter(outcome.kind for outcome in results.values())
    names = {key[0] for key in results}
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in SIGNS if kinds[kind])
    return f"{len(names)} architectures, {len(results)} cells: {counts}"


def details(results: Results) -> list[str]:
    """What is not equal, one line per cell; n/a only once for both halves of a cell."""
    lines = []
    for (name, mode, attached), outcome in results.items():
        same_for_both = outcome.kind == NOT_APPLICABLE and attached
        if same_for_both or not outcome.detail:
            continue
        where = f"{name} {mode}" + (" attached" if attached else "")
        lines.append(f"{where}: {outcome.kind}: {outcome.detail}")
    return lines


def to_json(results: Results) -> dict[str, Any]:
    """The matrix for a record: one sign per mode, as in the table."""
    names = list(dict.fromkeys(key[0] for key in results))
    return {
        "summary": summary(results),
        "signs": SIGNS,
        "modes": list(MODES),
        "architectures": {
            name: {
                "family": rows()[name].family,
                "alone": _signs(results, name, attached=False),
                "attached": _signs(results, name, attached=True),
            }
            for name in names
        },
        "details": details(results),
    }


def _signs(results: Results, name: str, *, attached: bool) -> str:
    outcomes = [results.get((name, mode, attached)) for mode in MODES]
    return "".join(" " if outcome is None else SIGNS[outcome.kind] for outcome in outcomes)
