"""The classes that carry the names: transformers' caches and mnemon's."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, final

from transformers import cache_utils

from mnemon.cache import Cache as MnemonCache
from mnemon.legacy.callers import is_own_cache
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["ROOT", "OldAttribute", "is_mnemon", "is_pair", "replace_everywhere"]

ROOT = cache_utils.Cache


def is_mnemon(cache: object) -> bool:
    """Whether its layers follow mnemon's contract."""
    return isinstance(cache, MnemonCache)


def is_pair(cache: object) -> bool:
    """Whether it is the cache of an encoder-decoder model."""
    return isinstance(cache, cache_utils.EncoderDecoderCache)


def replace_everywhere(
    patches: Patches, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put ``around(original)`` in the place of every own definition of method `name`.

    In transformers' cache_utils and mnemon only: what other subclasses define stays as it is.
    """
    for owner in _caches():
        original = vars(owner).get(name)
        replacement = None if original is None else around(original)
        if original is not None and replacement is not None and replacement is not original:
            patches.put(owner, name, functools.wraps(original)(replacement))


def _caches() -> list[type]:
    """The caches of transformers' cache_utils and of mnemon, and the bases between them."""
    found: dict[type, None] = {}
    for cls in (ROOT, *_below(ROOT)):
        for base in cls.__mro__:
            home = base.__module__
            ours = home.startswith("mnemon.") and not home.startswith(__package__)
            if ours or home == cache_utils.__name__:
                found[base] = None
    return list(found)


def _below(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _below(sub)


@final
class OldAttribute:
    """An attribute that caches had: computed for ours, plain for classes that keep their own.

    Args:
        key: its entry in the table of names.
        read: computes it.
        write: what assigning does; None: it stays on the cache as a plain attribute.
    """

    def __init__(
        self,
        notices: Notices,
        key: str,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self._notices, self._key, self._read, self._write = notices, key, read, write

    def __get__(self, cache: Any, owner: type | None = None) -> Any:
        if cache is None:
            return self
        if self._key in vars(cache):
            return vars(cache)[self._key]
        if self._key == "seen_tokens" and "_seen_tokens" in vars(cache):
            return vars(cache)["_seen_tokens"]  # the counter that a class keeps itself
        if "layers" not in vars(cache) and not is_pair(cache):
            raise AttributeError(f"{type(cache).__name__!r} object has no attribute {self._key!r}")
        self._notices.give(self._key)
        return self._read(cache)

    def __set__(self, cache: Any, value: Any) -> None:
        if self._write is None or not is_own_cache(cache):
            vars(cache)[self._key] = value
            return
        self._notices.give(self._key)
        self._write(cache, value)
