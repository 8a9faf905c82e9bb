"""Classes of the same names from other packages."""

from cachetools import Cache, LRUCache
from mylib.cache_utils import DynamicCache, StaticCache

from . import HybridCache
from .cache_utils import SinkCache


class Session:
    def __init__(self, cache: Cache, second: "DynamicCache") -> None:
        self.cache = cache
        self.second = second

    def read(self, past_key_values: DynamicCache, past_key_value: StaticCache) -> int:
        past_key_values.crop(3)
        past_key_value.update(1, 2, 3, 4)
        for k, v in self.cache:
            print(k, v)
        print(self.cache[0], self.second.key_cache[0], self.second[0][0].shape[2])
        return self.second.seen_tokens


config = object()
c = DynamicCache.from_legacy_cache(None)
s = StaticCache(config, 1, 128, device="cpu")
h = HybridCache(config, 1, 128)
k = SinkCache(10, 2)
lru = LRUCache(8)
