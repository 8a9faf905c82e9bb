"""mnemon keeps what a transformer needs to remember between two forward passes.

Names are imported when they are first used, so that ``import mnemon`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemon.binding import attach, detach, prefill
    from mnemon.cache import Cache
    from mnemon.export import export_model, load_export
    from mnemon.files import load_cache
    from mnemon.recipe import Recipe

    __version__: str

_HOME = {
    "Cache": "mnemon.cache",
    "Recipe": "mnemon.recipe",
    "attach": "mnemon.binding",
    "detach": "mnemon.binding",
    "export_model": "mnemon.export",
    "load_cache": "mnemon.files",
    "load_export": "mnemon.export",
    "prefill": "mnemon.binding",
}

__all__ = [
    "Cache",
    "Recipe",
    "attach",
    "detach",
    "diffusion",
    "errors",
    "export_model",
    "legacy",
    "load_cache",
    "load_export",
    "memory",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name in ("diffusion", "errors", "legacy", "memory"):
        return import_module(f"mnemon.{name}")
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'mnemon' has no attribute {name!r}; it has {__all__}")
    globals()[name] = value
    return value


def _version() -> str:
    # importlib.metadata takes longer to import than all that `mnemon plan` needs besides.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mnemon")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0+source"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
