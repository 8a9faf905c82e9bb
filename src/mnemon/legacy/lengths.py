"""How long a cache is and may become: the old questions, and cutting to a final size."""

import weakref
from collections.abc import Callable
from typing import Any

from mnemon.legacy.callers import is_own_cache, old_code_calls
from mnemon.legacy.hosts import ROOT, OldAttribute, replace_everywhere
from mnemon.legacy.own_lists import keeps_lists
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["Uncounted", "install"]


class Uncounted:
    """Tokens that old code wrote past the counter, which never counted what it was not told.

    Old code that puts tensors into `key_cache` by hand adds to `_seen_tokens` itself.
    """

    def __init__(self) -> None:
        self._tokens: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def read(self, cache: Any) -> int:
        """What `_seen_tokens` would say."""
        return int(cache.get_seq_length()) - self._tokens.get(cache, 0)

    def write(self, cache: Any, seen: int) -> None:
        """Old code sets the counter."""
        self._tokens[cache] = int(cache.get_seq_length()) - int(seen)

    def wrote_by_hand(self, cache: Any, num_tokens: int) -> None:
        """The cache grew (or shrank) by an assignment, which the counter does not see."""
        if num_tokens:
            self._tokens[cache] = self._tokens.get(cache, 0) + num_tokens

    def forget(self, cache: Any) -> None:
        """The counter and the tokens agree again."""
        self._tokens.pop(cache, None)


UNCOUNTED = Uncounted()


def install(patches: Patches, notices: Notices) -> None:
    patches.add(
        ROOT, "seen_tokens", OldAttribute(notices, "seen_tokens", UNCOUNTED.read, UNCOUNTED.write)
    )
    patches.add(
        ROOT,
        "_seen_tokens",
        OldAttribute(notices, "_seen_tokens", UNCOUNTED.read, UNCOUNTED.write),
    )
    patches.add(ROOT, "max_cache_len", OldAttribute(notices, "max_cache_len", _max_cache_len))
    patches.add(ROOT, "max_batch_size", OldAttribute(notices, "max_batch_size", _max_batch_size))

    def get_usable_length(self: Any, new_seq_length: int, layer_idx: int | None = 0) -> int:
        """Tokens that stay usable when `new_seq_length` more come."""
        notices.give("get_usable_length")
        held, limit = int(self.get_seq_length(layer_idx)), _limit(self)
        if limit is not None and held + new_seq_length > limit:
            return limit - new_seq_length
        return held

    def get_max_cache_shape(self: Any, layer_idx: int | None = None) -> int | None:
        """The most tokens; None without a bound, as up to 4.53 (4.54 to 5.19 said -1)."""
        notices.give("get_max_cache_shape")
        return _limit(self)

    patches.add(ROOT, "get_usable_length", get_usable_length)
    patches.add(ROOT, "get_max_cache_shape", get_max_cache_shape)
    # mnemon's caches have today's method in every release.
    replace_everywhere(patches, "get_max_length", lambda own: _max_length(own, notices))

    def get_max_length(self: Any) -> int | None:
        """The most tokens; None without a bound."""
        notices.give("get_max_length")
        return _limit(self)

    patches.add(ROOT, "get_max_length", get_max_length)
    replace_everywhere(patches, "crop", lambda own: _crop(own, notices))
    replace_everywhere(patches, "reset", _reset)


def _max_length(own: Callable[..., Any], notices: Notices) -> Callable[..., Any]:
    """Today's method, -1 without a bound; for old code, None."""

    def get_max_length(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not old_code_calls():
            return own(self, *args, **kwargs)
        notices.give("get_max_length")
        return _limit(self)

    return get_max_length


def _limit(cache: Any) -> int | None:
    """Room in tokens, None where there is no bound."""
    if keeps_lists(cache):
        return None
    if not is_own_cache(cache) and "get_max_length" in vars(type(cache)):
        ask = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
        found = ask()
        return None if found is None or found < 0 else int(found)
    part = getattr(cache, "self_attention_cache", cache)
    limits = [_layer_limit(layer) for layer in part.layers]
    known = [limit for limit in limits if limit is not None and limit >= 0]
    # A layer without a bound makes a cache without one.
    return max(known) if known and len(known) == len(limits) else None


def _layer_limit(layer: Any) -> int | None:
    if layer.is_sliding and not layer.is_compileable:
        return None  # it grows: what a window forgets is no bound on what may come
    for name in ("max_length", "max_cache_len"):
        limit = getattr(layer, name, None)
        if isinstance(limit, int):
            return limit
    ask = getattr(layer, "get_max_length", None) or getattr(layer, "get_max_cache_shape", None)
    return None if ask is None else int(ask())


def _max_cache_len(cache: Any) -> int | None:
    return _limit(cache)


def _max_batch_size(cache: Any) -> int | None:
    sizes = {getattr(layer, "batch_size", -1) for layer in cache.layers}
    return max((size for size in sizes if size > 0), default=None)


def _reset(own: Callable[..., Any]) -> Callable[..., Any]:
    def reset(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        UNCOUNTED.forget(self)

    return reset


def _crop(own: Callable[..., Any], notices: Notices) -> Callable[..., Any]:
    """Today's `crop(-n)` removes n tokens; of old, `crop(n)` left n and `crop(0)` none."""

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        size = next(iter((*args, *kwargs.values())), None)
        if size is None or int(size) < 0 or not old_code_calls():
            own(self, *args, **kwargs)
            UNCOUNTED.forget(self)
            return
        notices.give("positive_crop" if int(size) else "crop_zero")
        held = int(self.get_seq_length())
        if held > int(size):
            own(self, int(size) - held)
            UNCOUNTED.forget(self)

    return crop
