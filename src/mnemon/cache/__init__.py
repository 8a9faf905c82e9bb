"""The object that a user holds."""

from mnemon.cache.pair import EncoderDecoderCache
from mnemon.cache.plain import Cache
from mnemon.cache.state import CacheState, Prefilled

__all__ = ["Cache", "CacheState", "EncoderDecoderCache", "Prefilled"]
