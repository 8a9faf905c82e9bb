"""What the table says of one name."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

__all__ = ["Kind", "Message", "Name", "release"]


class Kind(StrEnum):
    """How a name is written where it is used."""

    ATTRIBUTE = "attribute"
    METHOD = "method"
    CLASS = "class"
    ARGUMENT = "argument"
    FORM = "form"  # not a name: indexing, iterating, passing a tuple, the sign of a number


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An error message that users search for, and what it means for them.

    Args:
        text: as transformers (or Python) prints it; ``...`` stands for what differs each time.
        cure: what to change, in one or two sentences.
        source: the file of transformers that prints it, in some release; empty for Python's own.
    """

    text: str
    cure: str
    source: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """One name of transformers' cache API, or one way of using it.

    Args:
        key: what the rest of mnemon calls this entry, such as ``"seen_tokens"``; unique.
        spelling: as written in code, such as ``"cache.seen_tokens"``.
        kind: how it is used.
        owner: the classes or functions of transformers that had it.
        lived: first and last release with it, closed at both ends; None is "still there".
        modern: what to write today, as code.
        meaning: what it meant, and what differs in the modern spelling.
        silent: what goes wrong today without any error, if something does.
        messages: what users see once it is gone.
        evidence: where a release's source shows that it has it, any of ``"Class"``,
            ``"Class.member"``, ``"Class.method(argument)"`` in its ``cache_utils.py``, or
            ``"path:text"``; empty where only running it tells. `scripts/name_history.py` checks
            `lived` against these.
    """

    key: str
    spelling: str
    kind: Kind
    owner: str
    lived: tuple[tuple[str, str | None], ...]
    modern: str
    meaning: str
    silent: str = ""
    messages: tuple[Message, ...] = ()
    evidence: tuple[str, ...] = ()

    def there_in(self, version: str) -> bool:
        """Whether release `version` (such as ``"4.57.6"``) has it; patch releases do not count."""
        wanted = release(version)
        return any(
            release(first) <= wanted and (last is None or wanted <= release(last))
            for first, last in self.lived
        )


def release(version: str) -> tuple[int, int]:
    """``"4.57.6"`` as ``(4, 57)``: names change between minor releases only."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
