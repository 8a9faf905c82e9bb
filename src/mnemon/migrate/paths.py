"""Which files a migration looks at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mnemon.errors import MigrateError

__all__ = ["STDIN", "find"]

STDIN = "-"
_SUFFIXES = (".py", ".pyi", ".ipynb")
_SKIPPED = {"node_modules", "__pycache__", "site-packages", "venv", "env"}


def find(paths: Iterable[str]) -> Iterator[str]:
    """Files to look at: what is named, and what lies in named folders, each once.

    Of a folder's own folders, hidden ones, virtual environments and node_modules are passed over
    unless they are named themselves. Links to folders are not followed.

    Raises:
        MigrateError: a path that is not there.
    """
    paths = list(paths)
    for path in paths:
        if path != STDIN and not os.path.exists(path):
            raise MigrateError(f"{path} is not there; name files, folders, or - for standard input")
    seen: set[str] = set()
    for path in paths:
        for found in _inside(path) if os.path.isdir(path) else [path]:
            real = os.path.realpath(found)
            if real not in seen:
                seen.add(real)
                yield found


def _inside(folder: str) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_skipped(root, name))
        for name in sorted(files):
            if name.endswith(_SUFFIXES):
                yield os.path.join(root, name)


def _is_skipped(root: str, name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED or (Path(root) / name / "pyvenv.cfg").exists()
