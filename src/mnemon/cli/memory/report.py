"""How an experiment's results look: on the terminal, as Markdown, as a chart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.files.atomic import write_atomically
from mnemon.memory.grc.experiments.arms import ARMS
from mnemon.memory.grc.experiments.tasks import TASKS

if TYPE_CHECKING:
    from mnemon.memory.grc.experiments.record import Record
    from mnemon.memory.grc.experiments.statistics import Mean, Row

__all__ = ["announce", "show", "write"]

_HEADINGS = ("arm", "parameters", "{}", "sd", "95% CI", "minus plain", "95% CI", "s/run")


def announce(record: Record) -> None:
    """Prints what is going to be run."""
    plan = record.plan
    done = len(plan.runs()) - len(record.missing())
    print(
        f"{TASKS[plan.task].title} ({plan.size}): {len(plan.arms)} arms x {plan.seeds} seeds x "
        f"{plan.steps} steps" + (f", {done} runs done before" if done else "")
    )
    for line in _facts(record):
        print(line)


def show(record: Record, out: Path) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    task = TASKS[record.plan.task]
    table = Table(title=_title(record))
    headings = ("arm", "parameters", task.metric, "sd", "±95%", "minus plain", "±95%")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
    for row in record.rows():
        table.add_row(*_short_cells(row, record))
    console = Console()
    console.print(table)
    console.print(_direction(record), style="dim")
    for line in _verdicts(record):
        console.print(line)
    name = f"grc_{record.plan.task}"
    console.print(f"wrote [bold]{out / name}.json[/], .md and .png", soft_wrap=True)


def write(record: Record, out: Path) -> None:
    """Writes the record, a table and a chart.

    Raises:
        FileError: a file cannot be written.
    """
    record.save()
    name = f"grc_{record.plan.task}"
    text, picture = _markdown(record), _chart(record)
    write_atomically(out / f"{name}.md", lambda file: file.write(text.encode()))
    write_atomically(out / f"{name}.png", lambda file: file.write(picture))


def _title(record: Record) -> str:
    plan = record.plan
    return f"{TASKS[plan.task].title}: {plan.seeds} seeds, {plan.steps} steps, {plan.size}"


def _direction(record: Record) -> str:
    task = TASKS[record.plan.task]
    better = "more" if task.higher_is_better else "less"
    return f"{task.metric}: {better} is better; differences are paired by seed"


def _scaled(record: Record) -> tuple[float, int]:
    """Factor and digits with which a score is shown: shares in percent."""
    return (100.0, 2) if TASKS[record.plan.task].metric == "accuracy" else (1.0, 4)


def _cells(row: Row, record: Record) -> list[str]:
    factor, digits = _scaled(record)

    def interval(mean: Mean | None) -> str:
        if mean is None or mean.half_width is None:
            return "-"
        low, high = mean.mean - mean.half_width, mean.mean + mean.half_width
        return f"{factor * low:.{digits}f} to {factor * high:.{digits}f}"

    difference = row.difference
    return [
        row.arm,
        f"{row.num_parameters:,}",
        f"{factor * row.score.mean:.{digits}f}",
        "-" if row.score.sd is None else f"{factor * row.score.sd:.{digits}f}",
        interval(row.score),
        "-" if difference is None else f"{factor * difference.mean:+.{digits}f}",
        interval(difference),
        f"{row.seconds:.0f}",
    ]


def _short_cells(row: Row, record: Record) -> list[str]:
    """As `_cells`, for a terminal: half an interval is shorter than both its ends."""
    factor, digits = _scaled(record)
    cells = _cells(row, record)

    def half(mean: Mean | None) -> str:
        if mean is None or mean.half_width is None:
            return "-"
        return f"{factor * mean.half_width:.{digits}f}"

    return [*cells[:4], half(row.score), cells[5], half(row.difference)]


def _facts(record: Record) -> Iterator[str]:
    facts = record.facts
    if "majority_accuracy" in facts:
        yield (
            f"The most frequent answer, {facts['majority_value']}, alone gets "
            f"{facts['majority_accuracy']:.2%}."
        )
    if "mean_tokens" in facts:
        yield (
            f"{facts['train_expressions']:,} expressions to train on, {facts['test_expressions']:,}"
            f" to test, {facts['mean_tokens']:.1f} tokens on average."
        )
    if "bits_of_byte_frequencies" in facts:
        yield (
            f"Byte frequencies alone get {facts['bits_of_byte_frequencies']:.3f} bits per byte. "
            f"Trained on {facts['train_bytes']:,} bytes, judged on {facts['judged_bytes']:,} of "
            "held-out files."
        )


def _verdicts(record: Record) -> Iterator[str]:
    """For each arm whether its interval is on one side of plain."""
    task = TASKS[record.plan.task]
    for row in record.rows():
        found = row.difference
        if found is None or found.half_width is None:
            continue
        if found.mean == found.half_width == 0:
            yield f"{row.arm}: equal to plain in every run"
        elif abs(found.mean) <= found.half_width:
            yield f"{row.arm}: no difference to plain can be told from chance"
        else:
            better = (found.mean > 0) == task.higher_is_better
            yield f"{row.arm}: {'better' if better else 'worse'} than plain"


def _markdown(record: Record) -> str:
    task, found = TASKS[record.plan.task], record.environment
    headings = [heading.format(task.metric) for heading in _HEADINGS]
    lines = [
        f"# GRC: {_title(record)}",
        "",
        f"{found['date']}, {found['system']}, {found['processor']}, {record.plan.steps} steps, "
        f"1 thread per run, torch {found['torch']}; `{found['command']}`. {_direction(record)}. "
        + " ".join(_facts(record)),
        "",
        f"| {' | '.join(headings)} |",
        "|---|" + "---:|" * (len(headings) - 1),
        *(f"| {' | '.join(_cells(row, record))} |" for row in record.rows()),
        "",
        *(f"- {line}" for line in _verdicts(record)),
        "",
        *(f"- `{row.arm}`: {_note(row.arm, record)}{_mixed(row)}" for row in record.rows()),
        "",
        f"![{task.metric} by arm](grc_{task.name}.png)",
    ]
    if record.missing():
        lines.insert(2, f"Unfinished: {len(record.missing())} runs are missing.\n")
    return "\n".join(lines) + "\n"


def _note(name: str, record: Record) -> str:
    return next(a.note for a in ARMS if a.name == name and record.plan.task in a.only)


def _mixed(row: Row) -> str:
    if not row.shares:
        return ""
    return "; sigmoid(lambda) by layer " + ", ".join(f"{share:.3f}" for share in row.shares)


def _chart(record: Record) -> bytes:
    """Each arm's seeds as dots, its mean with the interval."""
    from matplotlib.figure import Figure

    task = TASKS[record.plan.task]
    factor, _ = _scaled(record)
    found = record.rows()[::-1]
    figure = Figure(figsize=(7, 0.45 * len(found) + 1.6), layout="constrained")
    axes: Any = figure.subplots()
    for place, row in enumerate(found):
        values = [factor * value for value in row.score.values]
        axes.plot(values, [place] * len(values), "o", color="0.65", markersize=4)
        half = row.score.half_width
        axes.errorbar(
            factor * row.score.mean,
            place,
            xerr=None if half is None else factor * half,
            fmt="D",
            color="C0" if row.arm != "plain" else "C3",
            capsize=3,
        )
    plain = next(row for row in found if row.arm == "plain")
    axes.axvline(factor * plain.score.mean, color="C3", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(found)), [row.arm for row in found])
    unit = ", %" if factor == 100 else ""
    axes.set_xlabel(f"{task.metric}{unit} (mean, 95% interval; dots are seeds)")
    axes.set_title(_title(record))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
