"""Attributes set for a while: each one recorded, each one undone."""

import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, final

__all__ = ["Patches"]

_ABSENT: Any = object()


@final
class Patches:
    """Sets attributes of classes and modules and puts back what was there.

    An attribute that was there is overwritten in place and one that was not is added at the end,
    so undoing also restores the order of ``vars(owner)``.
    """

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``; the value before (or its absence) is remembered."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._done.append((owner, name, before, vars(owner)[name]))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` if reading it finds nothing, inherited or own."""
        if getattr(owner, name, _ABSENT) is _ABSENT:
            self.put(owner, name, value)

    def follow_into(self, modules: Iterable[ModuleType]) -> None:
        """Let `modules` that imported by name what was replaced in a module use the new one."""
        replaced = {
            (name, id(before)): now
            for owner, name, before, now in self._done
            if isinstance(owner, ModuleType) and before is not _ABSENT
        }
        for module in modules:
            for name, value in list(vars(module).items()):
                if (name, id(value)) in replaced:
                    self.put(module, name, replaced[name, id(value)])

    def owners(self) -> list[Any]:
        """Everything that was touched, each once."""
        return list({id(owner): owner for owner, *_ in self._done}.values())

    def undo(self) -> None:
        """Put everything back, last first; what others changed since is left alone, and said."""
        foreign = []
        while self._done:
            owner, name, before, ours = self._done.pop()
            if vars(owner).get(name, _ABSENT) is not ours:
                foreign.append(f"{getattr(owner, '__name__', owner)}.{name}")
            elif before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        if foreign:
            warnings.warn(
                f"mnemon.legacy leaves {', '.join(foreign)} alone: somebody set them after "
                "enable(). Undo in the reverse order of setting.",
                RuntimeWarning,
                stacklevel=3,
            )
