"""`mnemon migrate`: old names of transformers' cache API in your own code, to modern ones."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemon.cli import output
from mnemon.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemon.migrate import FileResult, Target


def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders (*.py, *.pyi, *.ipynb), or - for standard input."),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what would change (default).")] = False,
    write: Annotated[bool, typer.Option("--write", help="Change the files.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 3 if there is work.")
    ] = False,
    target: Annotated[
        str, typer.Option("--target", help="Release to run under: 4.57, 5.0 or 5.23.")
    ] = "5.23",
    sarif: Annotated[
        str | None, typer.Option("--sarif", help="Write SARIF 2.1.0 to this file, or to -.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes; as many as cores.")
    ] = None,
    list_rules: Annotated[
        bool, typer.Option("--list-rules", help="Every name that is looked for, and its cure.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Old names of transformers' cache API to modern ones, in .py files and notebooks.

    A place is rewritten only when the receiver is certainly a cache; what could not be decided is
    listed with file, line and reason. Exits with 3 when --check finds work to do.

    Examples: `mnemon migrate .` (a diff); `mnemon migrate --write src`;
    `mnemon migrate --check --sarif out.sarif .` (CI). Files that are not Python exit with 1.
    `# mnemon: keep` on a line leaves it alone.
    """
    from mnemon.cli import migrate_report
    from mnemon.migrate import Target
    from mnemon.migrate.paths import find
    from mnemon.migrate.run import migrate_files
    from mnemon.migrate.run import write as write_file

    try:
        chosen = Target.parse(target)
    except MigrateError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from error
    if list_rules:
        migrate_report.rules(as_json=as_json)
        return
    if not paths:
        raise typer.BadParameter("name files or folders, such as `mnemon migrate .`")
    if write + check + diff > 1:
        raise typer.BadParameter("--diff, --write and --check exclude each other")
    if as_json and sarif == "-":
        raise typer.BadParameter("--json and --sarif - both want standard output")
    quiet = as_json or sarif == "-"
    files = list(find(paths))
    results: list[FileResult] = []
    num_written = num_lines = 0
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(migrate_report.progress(len(files), hidden=quiet))
        for result in migrate_files(files, chosen, num_processes=jobs):
            advance()
            num_lines += result.num_lines
            if write and result.changed:
                num_written += _write(result, write_file)
            if result.findings or result.problems:
                results.append(result)
    if as_json:
        output.print_json(
            {
                "target": chosen.version,
                "num_files": len(files),
                "num_lines": num_lines,
                "num_written": num_written,
                "files": [result.to_dict() for result in results],
            }
        )
    elif sarif != "-":
        if not write and not check:
            migrate_report.diffs(results)
        migrate_report.summary(results, len(files), wrote=write, listed=check)
    if sarif is not None:
        _sarif(results, chosen, sarif)
    raise typer.Exit(_exit_code(results, check=check))


def _write(result: FileResult, write_file: Callable[[FileResult], None]) -> int:
    """Write one file; what the system refuses is a problem of that file, and the rest goes on."""
    from mnemon.migrate.model import Problem
    from mnemon.migrate.paths import STDIN

    if result.path == STDIN:
        sys.stdout.buffer.write(result.after)
        return 1
    try:
        write_file(result)
    except OSError as error:
        result.problems.append(Problem(message=f"cannot be written: {error}"))
        return 0
    return 1


def _sarif(results: list[FileResult], target: Target, where: str) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from mnemon.migrate.sarif import sarif

    try:
        installed = version("mnemon")
    except PackageNotFoundError:
        installed = "0"
    text = json.dumps(sarif(results, target, installed), indent=2) + "\n"
    if where == "-":
        print(text, end="")
    else:
        Path(where).write_text(text, encoding="utf-8")


def _exit_code(results: list[FileResult], *, check: bool) -> int:
    if any(result.problems for result in results):
        return output.EXIT_ERROR
    if check and any(result.findings for result in results):
        return output.EXIT_NO
    return output.EXIT_OK
