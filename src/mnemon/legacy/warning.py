"""One warning per removed name, with the line that used it and what to write instead."""

import sys
import warnings
from typing import final

from mnemon.names import lookup

__all__ = ["LegacyWarning", "Notices"]

# There again, and not what it was.
_OTHER_MEANING = frozenset({"get_max_length", "SlidingWindowCache", "SinkCache"})
_NOT_USERS = ("mnemon", "transformers", "torch")


class LegacyWarning(FutureWarning):
    """Code used a name that transformers removed and that `mnemon.legacy` stands in for."""


@final
class Notices:
    """Warns of each name once, from `enable` to `disable`."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def forget(self) -> None:
        """Warn of everything again."""
        self._given.clear()

    def give(self, key: str) -> None:
        """Warn that the entry `key` of the table of names was used, if that is news."""
        if key in self._given:
            return
        name = lookup(key)
        from transformers import __version__

        if name.there_in(__version__) and key not in _OTHER_MEANING:
            self._given.add(key)
            return
        warnings.warn(
            f"{name.spelling} is not what it was in transformers {name.lived[0][0]} to "
            f"{name.lived[0][1]}; mnemon.legacy stands in for it. Write today: {name.modern}",
            LegacyWarning,
            stacklevel=_level_of_user(),
        )
        self._given.add(key)  # not before: as an error it would be said once and then pass


def _level_of_user() -> int:
    """How far up the stack the first line stands that is not a library's."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS:
            return level
        frame, level = frame.f_back, level + 1
    return 2
