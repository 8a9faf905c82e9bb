"""Ordinary objects with attributes of the same names, in a file that uses transformers' caches."""

import functools
import hashlib

from PIL import Image
from transformers import AutoTokenizer, DynamicCache

picture = Image.open("a.png")
picture = picture.crop((0, 0, 10, 10))
picture.crop(5)
digest = hashlib.sha256()
digest.update(b"a")
settings: dict = {}
settings.update({"a": 1}, b=2)
tokenizer = AutoTokenizer.from_pretrained("x")
limit = tokenizer.get_max_length()
if limit is not None:
    print(limit)


class Counter:
    def __init__(self) -> None:
        self.seen_tokens = 0
        self.key_cache = {}

    def see(self, n: int) -> None:
        self.seen_tokens += n


counter = Counter()
counter.see(3)
print(counter.seen_tokens, counter.key_cache["a"])
cache = {}
cache["a"] = 1
print(cache["a"])
for k, v in cache.items():
    print(k, v)
for k, v in cache:
    print(k, v)
cache[0] = (1, 2)
first, second = cache[0]


@functools.lru_cache
def key_cache(n: int) -> int:
    return n


key_cache.cache_clear()


def handler(seen_tokens: int, cache, tracker, key_cache, value_cache) -> int:
    tracker.update(1, 2, 3)
    tracker.update(1, 2, 3, cache_kwargs={})
    tracker.crop(7)
    print(key_cache[0], value_cache[0], cache[0][0].shape[2], tracker.seen_tokens)
    return seen_tokens


def shadowed() -> None:
    c = DynamicCache()
    print(c.get_seq_length())
    c = {"key_cache": []}
    print(c["key_cache"])
    c = Counter()
    print(c.seen_tokens)
    for k, v in c.key_cache.items():
        print(k, v)


def hidden(DynamicCache) -> None:
    c = DynamicCache()
    print(c.seen_tokens, c.key_cache[0])
    DynamicCache.from_legacy_cache(None)


def text() -> str:
    # cache.seen_tokens, past_key_values.get_max_length()
    return "past_key_value.seen_tokens and DynamicCache.from_legacy_cache(x)"


def deleted() -> None:
    c = DynamicCache()
    del c
    c = Counter()
    print(c.seen_tokens)


def comprehension(items) -> list:
    cache = DynamicCache()
    print(cache.get_seq_length())
    return [cache.seen_tokens for cache in items]
