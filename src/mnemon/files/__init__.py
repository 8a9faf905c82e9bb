"""Caches in files: save, load, look inside.

A cache file is safetensors with a header that says what it is; see `header` for the bytes.
"""

from typing import TYPE_CHECKING, Any

from mnemon.files.summary import FileSummary, LayerSummary, read_summary

if TYPE_CHECKING:
    from mnemon.files.cachefile import load_cache, save_cache

__all__ = ["FileSummary", "LayerSummary", "load_cache", "read_summary", "save_cache"]


def __getattr__(name: str) -> Any:
    # Saving and loading need torch; looking inside a file does not.
    if name in ("load_cache", "save_cache"):
        from mnemon.files import cachefile

        return getattr(cachefile, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
