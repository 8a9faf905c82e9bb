"""On and off, counted."""

import sys
import threading
from types import TracebackType
from typing import final

from mnemon.errors import MnemonError
from mnemon.legacy import (
    arguments,
    classes,
    contents,
    generation,
    lengths,
    loading,
    old_configs,
    old_models,
    own_lists,
    updates,
)
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["SWITCH", "Enabled", "Switch"]

_REMOTE = "transformers_modules."
_GROUPS = (
    own_lists,
    lengths,
    contents,
    updates,
    arguments,
    classes,
    loading,
    old_configs,
    old_models,
    generation,
)


@final
class Switch:
    """Whether the removed names are there: one for the process, as transformers is one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._count = 0
        self._patches = Patches()
        self._notices = Notices()

    @property
    def is_enabled(self) -> bool:
        return self._count > 0

    def enable(self) -> "Enabled":
        with self._lock:
            if self._count == 0:
                self._notices.forget()
                try:
                    for group in _GROUPS:
                        group.install(self._patches, self._notices)
                    # Remote code that was tried before, without the shim.
                    remote = [m for n, m in sys.modules.items() if n.startswith(_REMOTE)]
                    self._patches.follow_into(remote)
                except BaseException:
                    self._patches.undo()
                    raise
            self._count += 1
        return Enabled(self)

    def disable(self) -> None:
        with self._lock:
            if self._count == 0:
                raise MnemonError(
                    "mnemon.legacy.disable() came without an enable() before it. Calls are "
                    "counted: one disable() for each enable(), none for a `with` block."
                )
            self._count -= 1
            if self._count == 0:
                self._patches.undo()


@final
class Enabled:
    """One `enable`, undone when its ``with`` block ends."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch
        self._open = True

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open and self._switch.is_enabled:
            self._switch.disable()
        self._open = False


SWITCH = Switch()
