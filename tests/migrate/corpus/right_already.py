"""Code for the newest release, and shims that are right in every release."""

import transformers
from packaging import version
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

try:
    from transformers.cache_utils import HybridCache
except ImportError:
    HybridCache = None

NEW = version.parse(transformers.__version__) >= version.parse("4.57")


def length(cache: Cache) -> int:
    if hasattr(cache, "seen_tokens"):
        return cache.seen_tokens
    return cache.get_seq_length()


def length_by_trying(cache: Cache) -> int:
    try:
        return cache.seen_tokens
    except AttributeError:
        return cache.get_seq_length()


def length_by_release(cache: Cache) -> int:
    if version.parse(transformers.__version__) < version.parse("4.45"):
        return cache.seen_tokens
    if not NEW:
        return cache.key_cache[0].shape[-2]
    return cache.get_seq_length()


def bound(cache: Cache) -> int:
    longest = cache.get_max_length()
    if longest == -1:
        return 0
    if cache.get_max_length() >= 0:
        return cache.get_max_length()
    return longest


def drop(cache: DynamicCache, num_rejected: int) -> None:
    cache.crop(-num_rejected)
    cache.crop(-3)
    cache.crop(min(5 - cache.get_seq_length(), 0))
    cache.crop(7 - cache.get_seq_length())


def fill(cache: Cache, k, v, layer_idx: int):
    return cache.update(k, v, layer_idx)


def entries(cache: DynamicCache):
    for keys, values, window in cache:
        print(keys, values, window)
    for layer in cache.layers:
        print(layer.keys, layer.values)
    for entry in cache:
        print(entry[0], entry[1])
    return [entry[2] for entry in cache]


def fixed(config) -> StaticCache:
    return StaticCache(config=config, max_cache_len=128)


def fixed_too(config) -> StaticCache:
    return StaticCache(config, 128)


def is_hybrid(cache) -> bool:
    return HybridCache is not None and isinstance(cache, HybridCache)


def as_pair(past_key_values):
    if isinstance(past_key_values, tuple):
        return past_key_values[0][0].shape[2]
    return past_key_values.get_seq_length()
