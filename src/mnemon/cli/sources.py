"""Where the commands' text comes from: this project's files, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon.errors import MnemonError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["InputError", "Source", "context_limit", "encode", "own_text", "read_text"]

MAX_TEXT_BYTES = 64 * 1024**2


class InputError(MnemonError, ValueError):
    """A text that a command was given cannot be used: unreadable, empty, or too long."""


class Source(NamedTuple):
    """A text and what to call it."""

    name: str
    text: str


def own_text() -> Source:
    """This package's own Python files: real text that is there wherever mnemon runs."""
    package = Path(__file__).resolve().parent.parent
    paths = sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix())
    pieces = [
        f"# {path.relative_to(package.parent).as_posix()}\n{path.read_text(encoding='utf-8')}"
        for path in paths
        if path.stat().st_size
    ]
    return Source(f"mnemon's own source ({len(pieces)} files)", "\n".join(pieces))


def read_text(path: str) -> Source:
    """Read a text file, or standard input for "-".

    Raises:
        InputError: it is not there, not readable, not UTF-8, empty, or larger than 64 MiB.
    """
    if path == "-":
        return Source("standard input", _checked("standard input", sys.stdin.buffer.read()))
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(
                f"{path} has {file.stat().st_size:,} bytes; a prompt file may have "
                f"{MAX_TEXT_BYTES:,}. Cut it, or give the part that is needed."
            )
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions."
        ) from error
    return Source(file.name, _checked(path, data))


def _checked(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}); "
            "convert it, e.g. with iconv."
        ) from error
    if not text.strip():
        raise InputError(f"{name} is empty; give it some text.")
    return text.replace("\r\n", "\n")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, special tokens as the tokenizer adds them; no warning if it is long."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def context_limit(config: Any) -> int | None:
    """The longest sequence the model was made for, in tokens; None where it names no limit."""
    text_config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        limit = getattr(text_config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def fit_length(config: Any, num_prompt: int, num_new: int) -> tuple[int, str]:
    """How many new tokens the model's context leaves room for.

    Args:
        config: the model's.
        num_prompt: tokens of the prompt.
        num_new: new tokens asked for.

    Returns:
        New tokens to generate, and a note when they are fewer than asked for, else "".

    Raises:
        InputError: the prompt alone fills the context.
    """
    limit = context_limit(config)
    if limit is None:
        return num_new, ""
    if config.is_encoder_decoder:  # the prompt and the answer have a context each
        if num_prompt > limit:
            raise _too_long(num_prompt, limit)
        num_prompt = 1
    if num_prompt >= limit:
        raise _too_long(num_prompt, limit)
    if num_prompt + num_new > limit:
        room = limit - num_prompt
        return room, f"only {room:,} new tokens fit: the model's context is {limit:,} tokens."
    return num_new, ""


def _too_long(num_prompt: int, limit: int) -> InputError:
    return InputError(
        f"the prompt has {num_prompt:,} tokens and the model's context is {limit:,}; "
        "shorten the prompt, or use a model with a longer context."
    )
