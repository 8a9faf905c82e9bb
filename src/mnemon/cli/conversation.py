"""The turns of a chat: how they read as a prompt, and how they are kept in a session file.

A session is one cache file. The transcript travels in the cache's notes, so that the two cannot
come apart; the cache's tokens are compared with the prompt again when the session goes on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemon.errors import FileError, MnemonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Conversation", "SessionError", "load_session", "save_session", "turn_marker"]

NOTE = "chat"
PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
ROLES = tuple(PLAIN_NAMES)


class SessionError(MnemonError, ValueError):
    """A session file holds a cache but no conversation that can be continued."""


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


def save_session(path: Path, conversation: Conversation, cache: Any) -> None:
    """Write cache and transcript into one file, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    cache.notes[NOTE] = {"messages": conversation.messages}
    try:
        cache.save(path)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"cannot write the session to {path}: {error.strerror or error}; choose another path."
        ) from error


def load_session(path: Path, model: PreTrainedModel) -> tuple[Conversation, Any]:
    """Read a session back.

    Raises:
        FileError: not a cache file, damaged, or of another model.
        SessionError: a cache file without a conversation.
    """
    import mnemon

    if not os.access(path, os.R_OK):
        raise FileError(f"cannot read {path}: permission denied; check the file's owner.")
    cache = mnemon.load_cache(path, model)
    note = cache.notes.get(NOTE)
    messages = note.get("messages") if isinstance(note, dict) else None
    # The file may have been written by anyone: nothing is assumed about the transcript.
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise SessionError(
            f"{path} is a cache, but not of a chat; use `mnemon generate --load-cache`, "
            "or name a new session file."
        )
    return Conversation([dict(message) for message in messages]), cache


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )
