"""The command line itself: help, exit codes, errors, sizes, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mnemon.cli import app, output
from mnemon.errors import MnemonError, PlanError


def exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main(arguments)
    code = stopped.value.code
    assert isinstance(code, int)
    return code


def imported_by(code: str) -> set[str]:
    """Names of all modules after running `code` in a fresh interpreter."""
    program = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("name", sorted(app.COMMANDS))
def test_every_command_has_help_and_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app.build(name), [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "Usage:" in result.output


def test_main_help_lists_all_commands_and_the_exit_codes() -> None:
    result = CliRunner().invoke(app.build(), ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name, (_, summary) in app.COMMANDS.items():
        assert name in result.output
        assert summary in result.output
    assert "130 interrupted" in result.output


GROUPED = [
    (group, name, summary)
    for group, (_, commands) in app.GROUPS.items()
    for name, (_, summary) in commands.items()
]


@pytest.mark.parametrize(("group", "name", "summary"), GROUPED)
def test_commands_of_groups(
    group: str, name: str, summary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app.build(f"{group} {name}"), [group, name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    listed = CliRunner().invoke(app.build(), [group, "--help"])
    assert name in listed.output
    assert summary in listed.output


def test_only_the_command_that_runs_is_imported() -> None:
    modules = imported_by("from mnemon.cli import app; app.build('inspect')")
    assert "mnemon.cli.inspect" in modules
    others = {module for name, (module, _) in app.COMMANDS.items() if name != "inspect"}
    assert not modules & (others | {"torch", "transformers", "matplotlib"})


def test_start_imports_nothing_heavy() -> None:
    modules = imported_by("import mnemon.cli.app")
    assert not modules & {"torch", "transformers", "typer", "rich", "numpy", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], output.EXIT_OK),
        (["--help"], output.EXIT_OK),
        (["nothing-like-it"], output.EXIT_USAGE),
        (["inspect"], output.EXIT_USAGE),
        (["diffusion"], output.EXIT_USAGE),
        (["diffusion", "--help"], output.EXIT_OK),
        (["diffusion", "nothing-like-it"], output.EXIT_USAGE),
        (["diffusion", "demo", "--steps", "1"], output.EXIT_USAGE),
        (["diffusion", "demo", "/no/such/folder"], output.EXIT_ERROR),
        (["plan", "--batch", "zero"], output.EXIT_USAGE),
        (["plan", "/no/such/folder"], output.EXIT_ERROR),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_an_error_is_a_short_message_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["plan", "/no/such/folder"]) == output.EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "/no/such/folder" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_with_json_an_error_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["plan", "/no/such/folder", "--json"]) == output.EXIT_ERROR
    found = json.loads(capsys.readouterr().out)
    assert found["error"]["type"] == "ModelError"
    assert "/no/such/folder" in found["error"]["message"]


def test_guarded_turns_errors_into_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException, as_json: bool = False) -> None:
        raise error

    guarded = output.guarded(fail)
    for error, code in ((PlanError("why"), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stopped:
            guarded(error=error)
        assert stopped.value.code == code
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        guarded(error=ZeroDivisionError())
    for error, code in ((MnemonError("why"), 1), (OSError("why"), 1), (KeyboardInterrupt(), 130)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            guarded(error=error, as_json=True)
        assert stopped.value.code == code
        out = capsys.readouterr().out
        assert json.loads(out)["error"]["message"] in ("why", "interrupted")
        assert len(out.splitlines()) == 1  # also a line of `chat --json`


def run_plan(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mnemon", "plan", *arguments]
    return subprocess.run(words, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"]])
def test_a_closed_pipe_needs_no_message(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_plan(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (output.EXIT_ERROR, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run_plan(*arguments, stdout=full)
    assert done.returncode == output.EXIT_ERROR
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_ascii_terminal_gets_question_marks() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run_plan(stdout=subprocess.PIPE, env=environment)
    assert done.returncode == output.EXIT_OK
    assert "tiny-stdlib ? llama" in done.stdout


def test_guarded_keeps_the_signature_for_typer() -> None:
    seen = []

    def command(number: int, loud: bool = False) -> None:
        seen.append((number, loud))

    application = typer.Typer()
    application.command()(output.guarded(command))
    assert CliRunner().invoke(application, ["7", "--loud"]).exit_code == 0
    assert seen == [(7, True)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5k", 1536),
        ("1_000", 1000),
        ("7b", 7),
        ("2TB", 2 * 10**12),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert output.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "24GiBs", "12ib", "nan", "0x10", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        output.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "count"), [("128k", 131072), ("1M", 2**20), ("4,096", 4096), ("1.5k", 1536)]
)
def test_counts_are_read(text: str, count: int) -> None:
    assert output.parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-3", "k", "4 096", "1g", "0.2", "abc"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        output.parse_count(text)


@pytest.mark.parametrize("text", ["9" * 31, "9" * 30 + "k", "9" * 5000, "1." + "0" * 400])
def test_what_no_machine_has_is_refused(text: str) -> None:
    for read in (output.parse_bytes, output.parse_count):
        with pytest.raises(ValueError, match="too large"):
            read(text)


@given(st.integers(min_value=0, max_value=2**80))
def test_whole_numbers_keep_every_digit(size: int) -> None:
    assert output.parse_bytes(str(size)) == size


@given(st.integers(min_value=1, max_value=2**40))
def test_contexts_read_back_as_they_are_written(count: int) -> None:
    assert output.parse_count(output.format_context(count)) == count


@given(st.integers(min_value=0, max_value=2**50))
def test_formatted_sizes_are_close(size: int) -> None:
    number, unit = output.format_bytes(size).split()
    assert output.parse_bytes(number.replace(",", "") + unit) == pytest.approx(size, rel=0.006)


def test_plain_tables_align_with_colours() -> None:
    table = output.plain_table(["name", "n"], [["a", "\x1b[32m1\x1b[0m"], ["long", "22"]])
    lines = [output._COLOUR_CODE.sub("", line) for line in table.splitlines()]
    assert lines[0] == "name   n"
    assert lines[2:] == ["a      1", "long  22"]


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", "red", Terminal()) == "x"
    assert output.paint("x", "red") == "x"
