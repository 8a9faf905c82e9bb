"""Old cache classes that keep their tensors in lists of their own (H2O, SnapKV, StreamingLLM ...).

    class Kept(DynamicCache):                     # or Cache itself
        def __init__(self):
            super().__init__()
            self.key_cache, self.value_cache = [], []
        def update(self, keys, values, layer_idx, cache_kwargs=None): ...

Today's base class answers from `layers`, which such a class never fills: masks, positions, beams
and cuts would be those of an empty cache. While the shim is on they come from the lists.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import __version__, cache_utils

from mnemon.legacy.callers import is_own_cache
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices
from mnemon.names import lookup

__all__ = ["install", "keeps_lists"]


def keeps_lists(cache: Any) -> bool:
    """Whether a cache keeps its tensors itself, in ``key_cache`` and ``value_cache``."""
    held = vars(cache)
    return isinstance(held.get("key_cache"), list) and not is_own_cache(cache)


def install(patches: Patches, notices: Notices) -> None:
    # Before the groups that wrap the same methods: those know who calls, these hold what is asked.
    native = lookup("cache[i]").there_in(__version__)
    for owner in (cache_utils.Cache, cache_utils.DynamicCache):
        for name, verb in (_VERBS | _PAIRS if native else _VERBS).items():
            original = vars(owner).get(name)
            if original is not None:
                patches.put(owner, name, _either(original, verb))


def _either(own: Callable[..., Any], verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (verb if keeps_lists(self) else own)(self, *args, **kwargs)

    return method


def _length(cache: Any, layer_idx: int | None = 0) -> int:
    keys, index = cache.key_cache, layer_idx or 0
    filled = index < len(keys) and isinstance(keys[index], torch.Tensor) and keys[index].numel()
    return int(keys[index].shape[-2]) if filled else 0


def _mask_sizes(cache: Any, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
    new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else int(query_length)
    return int(cache.get_seq_length(layer_idx)) + new, 0


def _offset(cache: Any, layer_idx: int = 0) -> int:
    return int(cache.get_seq_length(layer_idx))


def _of_each(cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for tensors in (cache.key_cache, cache.value_cache):
        tensors[:] = [
            change(t) if isinstance(t, torch.Tensor) and t.numel() else t for t in tensors
        ]


def _reorder(cache: Any, beam_idx: torch.Tensor) -> None:
    _of_each(cache, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))


def _crop(cache: Any, tokens_to_remove: int) -> None:
    """As the installed release means it: -n removes n tokens, n is a final size where it was."""
    given, held = int(tokens_to_remove), int(cache.get_seq_length())
    emptied = given == 0 and lookup("crop_zero").there_in(__version__)
    count = held - given if given > 0 or emptied else -given
    if count > 0:
        _of_each(cache, lambda tensor: tensor[..., : max(tensor.shape[-2] - count, 0), :])
        if "_seen_tokens" in vars(cache):
            vars(cache)["_seen_tokens"] -= count


def _reset(cache: Any) -> None:
    cache.key_cache.clear()
    cache.value_cache.clear()
    if "_seen_tokens" in vars(cache):
        vars(cache)["_seen_tokens"] = 0


def _repeat(cache: Any, repeats: int) -> None:
    _of_each(cache, lambda tensor: tensor.repeat_interleave(repeats, dim=0))


def _select(cache: Any, indices: torch.Tensor) -> None:
    _of_each(cache, lambda tensor: tensor[indices, ...])


def _unbounded(cache: Any, *args: Any) -> int:
    return -1


def _count(cache: Any) -> int:
    return len(cache.key_cache)


def _pair(cache: Any, index: int) -> tuple[Any, Any]:
    return cache.key_cache[index], cache.value_cache[index]


def _pairs(cache: Any) -> Iterator[tuple[Any, Any]]:
    return iter(zip(cache.key_cache, cache.value_cache, strict=True))


_VERBS: dict[str, Callable[..., Any]] = {
    "get_seq_length": _length,
    "get_mask_sizes": _mask_sizes,
    "get_query_offset": _offset,
    "get_max_length": _unbounded,
    "get_max_cache_shape": _unbounded,
    "reorder_cache": _reorder,
    "crop": _crop,
    "reset": _reset,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
    "__len__": _count,
}
#: Where indexing and iterating still give pairs, up to 4.57; later the group `contents` does.
_PAIRS: dict[str, Callable[..., Any]] = {"__getitem__": _pair, "__iter__": _pairs}
