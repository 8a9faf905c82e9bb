"""A cache of the author's own, with transformers' names, beside an import of transformers."""

from collections import OrderedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class RingCache:
    """Keeps the last n tokens; unrelated to transformers."""

    def __init__(self, size: int) -> None:
        self.seen_tokens = 0
        self._seen_tokens = 0
        self.key_cache: list[torch.Tensor] = []
        self.value_cache: list[torch.Tensor] = []
        self.size = size

    def get_max_length(self) -> int:
        return self.size

    def get_usable_length(self, new: int, layer: int = 0) -> int:
        return min(self.seen_tokens, self.size - new)

    def to_legacy_cache(self) -> tuple:
        return tuple(zip(self.key_cache, self.value_cache, strict=True))

    @classmethod
    def from_legacy_cache(cls, past: tuple) -> "RingCache":
        made = cls(16)
        made.key_cache = [k for k, _ in past]
        return made

    def update(self, key, value, layer, cache_kwargs=None):
        self.key_cache.append(key)
        self.value_cache.append(value)
        self.seen_tokens += key.shape[-2]
        self._seen_tokens = self.seen_tokens
        return self.key_cache[layer], self.value_cache[layer]

    def crop(self, n: int) -> None:
        self.key_cache = [k[..., :n, :] for k in self.key_cache]
        self.seen_tokens = n

    def __getitem__(self, i: int):
        return self.key_cache[i], self.value_cache[i]

    def __iter__(self):
        return iter(zip(self.key_cache, self.value_cache, strict=True))


def use(ring: RingCache, key, value) -> int:
    ring.update(key, value, 0, {"a": 1})
    ring.crop(5)
    ring.crop(0)
    for k, v in ring:
        print(k, v)
    length = ring.get_max_length()
    if length is not None:
        print(
            ring.seen_tokens, ring.get_usable_length(1, 0), ring.key_cache[0], ring[0][0].shape[2]
        )
    return len(ring.to_legacy_cache())


cache = RingCache(8)
print(cache.seen_tokens, cache.key_cache, cache[0])
again = RingCache.from_legacy_cache(())
print(again.value_cache[0])
lru: OrderedDict = OrderedDict()
tokenizer, model = AutoTokenizer, AutoModelForCausalLM
