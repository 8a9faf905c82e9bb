"""What all commands share: exit codes, sizes as people write them, tables, JSON and errors.

No torch, rich or typer at import: `mnemon plan` must answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mnemon.errors import MnemonError

if TYPE_CHECKING:
    from pathlib import Path

EXIT_OK = 0
EXIT_ERROR = 1  # a MnemonError: the message says what to do
EXIT_USAGE = 2  # the command line itself is wrong
EXIT_NO = 3  # it ran, and the answer is no: does not fit, tokens differ
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it

_MOST = 10**30  # of bytes or tokens: products of two of them are still floats

_SCALE = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL_SCALE = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.ASCII | re.IGNORECASE)
_COLOUR_CODE = re.compile(r"\x1b\[\d*m")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([km]?)", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read a size: "24GiB", "24G" (the same), "24GB" (decimal), "1.5t", "4096".

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.fullmatch(text.strip().replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or 512MiB, 24GiB, 24GB")
    number, unit, suffix = match[1], match[2].lower(), (match[3] or "").lower()
    if not unit and suffix == "ib":
        raise ValueError(f"{text!r} is not a size; write bytes, or 512MiB, 24GiB, 24GB")
    return _scaled(number, _DECIMAL_SCALE[unit] if unit and suffix == "b" else _SCALE[unit])


def parse_count(text: str) -> int:
    """Read a number of tokens: "128k" (131,072), "1M" (1,048,576), "4096".

    Raises:
        ValueError: not a positive whole number.
    """
    match = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    count = _scaled(match[1], _SCALE[match[2].lower()]) if match else 0
    if count < 1:
        raise ValueError(f"{text!r} is not a number of tokens; write 4096, 32k or 1M")
    return count


def _scaled(number: str, scale: int) -> int:
    # Whole numbers stay integers: a float would round above 2**53.
    if len(number) > 30:  # int() and float() have limits of their own
        raise ValueError(f"{number[:12]}... is too large; at most {_MOST:.0e} is read")
    found = int(number) * scale if "." not in number else round(float(number) * scale)
    if found > _MOST:
        raise ValueError(f"{number} is too large; at most {_MOST:.0e} is read")
    return found


def format_bytes(size_bytes: float) -> str:
    """Write a size with three or four digits and a binary unit: "1.50 GiB", "960 B"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{size:.0f} B"
    return f"{size:.2f} {unit}" if abs(size) < 100 else f"{size:,.0f} {unit}"


def format_count(count: float) -> str:
    """Write a whole number with thousands separators."""
    return f"{count:,}" if isinstance(count, int) else f"{count:,.0f}"


def format_context(num_tokens: int) -> str:
    """Write a context length as people do: "32k" for 32,768, "1,000" for 1,000."""
    if num_tokens >= 1024 and num_tokens % 1024 == 0:
        return f"{num_tokens // 1024:,}k"
    return f"{num_tokens:,}"


class OutputError(MnemonError, OSError):
    """A result cannot be written where it was asked for."""


def check_writable(folder: Path) -> None:
    """Fail before minutes of work, not after.

    Raises:
        OutputError: the folder cannot be made, or no file can be made in it.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out."
        ) from error


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value, indent=2, default=str))


def print_error(error: BaseException, *, as_json: bool) -> None:
    """Say what went wrong without a traceback: on stderr, or as a JSON object on stdout."""
    message = str(error) or type(error).__name__
    if as_json:
        try:
            # One line: `chat --json` prints a document per line.
            print(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
            sys.stdout.flush()
            return
        except OSError:  # standard output itself is what went wrong
            _discard_output()
    print(f"{paint('error:', 'red', sys.stderr)} {message}", file=sys.stderr)


def _discard_output() -> None:
    """Send what is left for standard output nowhere, so that leaving does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that a MnemonError becomes a short message and an exit code.

    So do what the system refuses (a full disk) and Ctrl-C; a closed pipe needs no message. A
    command that takes `as_json` gets its errors as JSON too.
    """
    from functools import wraps

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        as_json = bool(kwargs.get("as_json"))
        try:
            found = function(*args, **kwargs)
            sys.stdout.flush()  # here its failure is still ours to explain
            return found
        except BrokenPipeError:  # nobody reads on (`| head`): no message, but it is not done
            _discard_output()
            sys.exit(EXIT_ERROR)
        except (MnemonError, OSError) as error:
            print_error(error, as_json=as_json)
            sys.exit(EXIT_ERROR)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            print_error(OutOfMemory(_OUT_OF_MEMORY.format(str(error)[:200])), as_json=as_json)
            sys.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            if as_json:
                print_error(KeyboardInterrupt("interrupted"), as_json=True)
            else:
                print("interrupted", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)

    return command


class OutOfMemory(MnemonError, MemoryError):
    """The machine or the accelerator has not the memory that a command needs."""


_OUT_OF_MEMORY = (
    "out of memory ({}); use a shorter prompt, a smaller static(n), fewer rows or beams, or a "
    "smaller --dtype. `mnemon plan --memory` says what fits."
)


def _is_out_of_memory(error: BaseException) -> bool:
    """Without importing torch: accelerators have an error of their own, a CPU only its message."""
    is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return is_torch or isinstance(error, MemoryError)


_COLOURS = {"red": "31", "green": "32", "bold": "1", "dim": "2"}


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Colour `text` where the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Draw a table without rich, whose import alone takes a third of `mnemon plan`'s time.

    Args:
        header: column titles.
        rows: cells, already formatted.
        left: how many columns, from the first, align left; the others hold numbers.
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        words = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (width - _width(cell))
            words.append(cell + padding if column < left else padding + cell)
        return "  ".join(words).rstrip()

    rule = "  ".join("─" * width for width in widths)
    body = [line(row) for row in rows]
    return "\n".join([paint(line(header), "bold"), paint(rule, "dim"), *body])


def _width(cell: str) -> int:
    """Columns that a cell takes: escape sequences take none."""
    return len(_COLOUR_CODE.sub("", cell))
