"""Other packages' caches as settings: read from a ``contenders.py`` outside mnemon."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mnemon.cli.diffusion.settings import Setting
from mnemon.errors import DiffusionError

__all__ = ["load_peers"]

_MODULE = "mnemon_diffusion_contenders"


def load_peers(path: Path, steps: int) -> list[Setting]:
    """The peers that a file (or the folder of a ``contenders.py``) lists.

    Its function ``peers(steps=...)`` returns objects with `name`, `package`, `method`, `apply` and
    `error`, as benchmarks/peers/diffusion/contenders.py does. The file is run: it is code.

    Raises:
        DiffusionError: no such file, or one that cannot be used.
    """
    file = path.expanduser()
    if file.is_dir():
        file = file / "contenders.py"
    if not file.is_file():
        raise DiffusionError(
            f"{file}: no such file; --peers takes a contenders.py, or a folder with one (in "
            "mnemon's repository: benchmarks/peers/diffusion)"
        )
    spec = importlib.util.spec_from_file_location(_MODULE, file)
    if spec is None or spec.loader is None:
        raise DiffusionError(f"{file}: not a Python file; --peers takes a contenders.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
        listed: list[Any] = list(module.peers(steps=steps))
        return [_setting(peer) for peer in listed]
    except Exception as error:
        raise DiffusionError(
            f"{file}: cannot be used ({type(error).__name__}: {error}); it needs a function "
            "peers(steps) like the one in benchmarks/peers/diffusion/contenders.py"
        ) from error


def _setting(peer: Any) -> Setting:
    return Setting(
        family=f"{peer.package} {peer.method}",
        name=f"{peer.package}: {peer.name}",
        library=peer.package,
        apply=peer.apply,
        known_error=peer.error,
        any_error=True,
    )
