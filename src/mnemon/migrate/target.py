"""The release to migrate to: which names it lacks, and how the modern ones are written there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import final

from mnemon.errors import MigrateError
from mnemon.names import lookup
from mnemon.names.model import release

__all__ = ["TARGETS", "Target"]

TARGETS = ("4.57", "5.0", "5.23")


@final
@dataclass(frozen=True, slots=True)
class Target:
    """A release of transformers that the code should run under."""

    version: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target called `text`.

        Raises:
            MigrateError: not one of `TARGETS`.
        """
        if text not in TARGETS:
            raise MigrateError(f"{text!r} is not a target; expected one of {', '.join(TARGETS)}")
        return cls(text)

    def lacks(self, key: str) -> bool:
        """Whether the name called `key` in the table is not there."""
        return _lacks(key, self.version)

    def at_least(self, version: str) -> bool:
        """Whether this is `version` or later."""
        return release(self.version) >= release(version)


@lru_cache(maxsize=1024)
def _lacks(key: str, version: str) -> bool:
    return not lookup(key).there_in(version)
