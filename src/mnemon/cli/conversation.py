"""The turns of a chat: how they read as a prompt, and how they are kept between two runs.

A session is a transcript (JSON, at the path the user gave) and beside it the cache (the same path
with ``.cache`` appended). The cache only saves work: its tokens are compared with the transcript's
before they are used, so one that is missing, damaged, old or of another model costs time, never
the conversation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.errors import MnemonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Conversation",
    "SessionError",
    "cache_path",
    "load_conversation",
    "save_session",
    "turn_marker",
]

FORMAT, VERSION = "mnemon-chat", 1
PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
ROLES = tuple(PLAIN_NAMES)


class SessionError(MnemonError, ValueError):
    """A session file holds no conversation that can be continued."""


@dataclass(slots=True)
class Conversation:
    """Messages so far, each ``{"role": ..., "content": ...}``."""

    messages: list[dict[str, str]] = field(default_factory=list)

    def add(self, role: str, content: str) -> None:
        """Append a turn."""
        self.messages.append({"role": role, "content": content})

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    @property
    def num_turns(self) -> int:
        """Questions so far."""
        return sum(message["role"] == "user" for message in self.messages)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The whole conversation as token ids, open for the assistant's next turn."""
        if tokenizer.chat_template is None:
            return list(tokenizer(_plain(self.messages), verbose=False)["input_ids"])
        text = tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False
        )
        # The template wrote the special tokens already.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _plain(messages: list[dict[str, str]]) -> str:
    turns = [f"{PLAIN_NAMES[message['role']]}: {message['content']}\n" for message in messages]
    return "".join(turns) + f"{PLAIN_NAMES['assistant']}:"


def turn_marker(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that opens the user's next turn: a model without end tokens writes it and goes on.

    Returns:
        The marker, or None where the template ends an answer with a special token, which stops
        generation by itself.
    """
    if tokenizer.chat_template is None:
        return f"\n{PLAIN_NAMES['user']}:"
    messages = [("user", "\x01"), ("assistant", "\x02"), ("user", "\x03")]
    text = str(
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages], tokenize=False
        )
    )
    if "\x02" not in text or "\x03" not in text:
        return None
    between = text.split("\x02", 1)[1].split("\x03", 1)[0]
    if any(token in between for token in tokenizer.all_special_tokens):
        return None
    return between.rstrip(" ") or None


def cache_path(path: Path) -> Path:
    """Where the cache of the session at `path` lies."""
    return path.with_name(path.name + ".cache")


def save_session(
    path: Path, conversation: Conversation, cache: Any, model: PreTrainedModel
) -> None:
    """Write the transcript and the cache, each whole or not at all.

    Raises:
        FileError: one of them cannot be written; the old one is intact.
    """
    from mnemon.files.atomic import write_atomically

    transcript = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": str(cache.recipe),
        "messages": conversation.messages,
    }
    data = json.dumps(transcript, indent=1, ensure_ascii=False).encode()
    write_atomically(path, lambda writer: writer.write(data))
    cache.save(cache_path(path), model=model)


def load_conversation(path: Path) -> tuple[Conversation, str]:
    """Read a transcript.

    Returns:
        The conversation, and the recipe of its cache.

    Raises:
        SessionError: unreadable, or not a transcript of this version.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise SessionError(
            f"cannot read the session {path}: {error.strerror or error}; check the path."
        ) from error
    except ValueError as error:
        raise SessionError(_not_a_session(path)) from error
    # The file may come from anyone: nothing about it is assumed.
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SessionError(_not_a_session(path))
    if found.get("version") != VERSION:
        raise SessionError(
            f"{path} is a session of version {found.get('version')!r}, this mnemon reads "
            f"version {VERSION}; upgrade mnemon, or name a new file."
        )
    messages, recipe = found.get("messages"), found.get("recipe")
    if (
        not isinstance(messages, list)
        or not all(_is_message(message) for message in messages)
        or not isinstance(recipe, str)
    ):
        raise SessionError(f"{path} is a damaged session; restore it, or name a new file.")
    return Conversation([dict(message) for message in messages]), recipe


def _not_a_session(path: Path) -> str:
    return (
        f"{path} is not a chat session; name a new file, and continue a saved cache with "
        "`mnemon generate --load-cache`."
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )
