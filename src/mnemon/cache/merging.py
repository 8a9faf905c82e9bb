"""One cache out of several: their rows, aligned at the newest token."""

import weakref
from collections.abc import Sequence

from transformers import PreTrainedModel

from mnemon.cache.plain import Cache
from mnemon.errors import CacheError
from mnemon.hf.fingerprint import fingerprint
from mnemon.token_log import TokenLog

__all__ = ["merge"]


def merge(caches: Sequence[Cache]) -> Cache:
    """The rows of all `caches` in one; see `Cache.merge`."""
    if not caches:
        raise CacheError("Cache.merge takes at least one cache; got none.")
    first = caches[0]
    for other in caches[1:]:
        if type(other) is not type(first) or other.recipe != first.recipe:
            raise CacheError(
                f"Cannot merge a {type(first).__name__} of recipe {str(first.recipe)!r} with a "
                f"{type(other).__name__} of {str(other.recipe)!r}."
            )
        if len(other.layers) != len(first.layers):
            raise CacheError(
                f"Cannot merge caches of {len(first.layers)} and {len(other.layers)} layers."
            )
    merged = first._like(
        [
            [column[0].merge(column[1:]) for column in zip(*groups, strict=True)]
            for groups in zip(*(cache._groups() for cache in caches), strict=True)
        ]
    )
    merged._log = TokenLog.merge([cache.tokens for cache in caches])
    keys = {cache.content_key for cache in caches}
    merged.content_key = keys.pop() if len(keys) == 1 else None
    merged.filled_by = _filled_alike(caches)
    merged.filled_version = min(
        (cache.filled_version for cache in caches if cache.filled_version is not None),
        default=None,
    )
    return merged


def _filled_alike(caches: Sequence[Cache]) -> "weakref.ref[PreTrainedModel] | None":
    """Which model filled `caches`; of several, one that is gone: nobody can vouch for it.

    Raises:
        CacheError: models that compute differently.
    """
    known = [cache.filled_by for cache in caches if cache.filled_by is not None]
    models = {id(model): model for found in known if (model := found()) is not None}
    first, *others = models.values() or (None,)
    for other in others:
        differences = [] if first is None else fingerprint(first).differences(fingerprint(other))
        if differences:
            raise CacheError(f"Cannot merge caches of different models: {'; '.join(differences)}.")
    gone = [found for found in known if found() is None]
    return next(iter([*gone, *known]), None)
