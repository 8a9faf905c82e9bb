"""What the old names mean, on transformers' caches and on ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

import mnemon
from mnemon.errors import CacheError

from .conftest import pairs

pytestmark = pytest.mark.usefixtures("enabled")
CONFIG = transformers.LlamaConfig(
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    hidden_size=8,
    intermediate_size=8,
    vocab_size=16,
    max_position_embeddings=64,
)
Make = Callable[[], Any]
GROWING = [
    pytest.param(DynamicCache, id="DynamicCache"),
    pytest.param(lambda: DynamicCache(config=CONFIG), id="DynamicCache(config)"),
    pytest.param(lambda: mnemon.Cache(CONFIG), id="mnemon.Cache"),
]
OURS_ALSO = [*GROWING, pytest.param(lambda: mnemon.Cache(CONFIG, "static(9)"), id="mnemon static")]
PREALLOCATED = [
    pytest.param(lambda: StaticCache(config=CONFIG, max_cache_len=9), id="StaticCache"),
    pytest.param(lambda: mnemon.Cache(CONFIG, "static(9)"), id="mnemon static"),
]


def filled(make: Make, tokens: int = 5, **extra: Any) -> Any:
    cache = make()
    for index, (keys, values) in enumerate(pairs(tokens=tokens)):
        cache.update(keys, values, index, **extra)
    return cache


def as_transformers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called from code of transformers."""
    return type(function)(
        function.__code__, {**function.__globals__, "__name__": "transformers.somewhere"}
    )


@pytest.mark.parametrize("make", [*OURS_ALSO, PREALLOCATED[0]])
def test_lengths(make: Make) -> None:
    cache = filled(make)
    assert cache.seen_tokens == cache._seen_tokens == 5
    assert cache.get_usable_length(3) == cache.get_usable_length(3, 1) == 5
    bound = cache.get_max_length()
    assert bound == (None if make in [p.values[0] for p in GROWING] else 9)
    if bound is not None:
        assert cache.get_usable_length(6) == 3
        assert cache.max_cache_len == 9
        assert cache.max_batch_size == 1


@pytest.mark.parametrize("make", [*OURS_ALSO, PREALLOCATED[0]])
def test_todays_code_keeps_todays_answer(make: Make) -> None:
    cache = filled(make)
    ask = as_transformers(lambda cache: cache.get_max_length())
    old = as_transformers(lambda cache: cache.get_max_length(0))
    if hasattr(transformers.cache_utils.CacheLayerMixin, "get_max_length") or isinstance(
        cache, mnemon.Cache
    ):
        expected = -1 if cache.get_max_length() is None else 9
        assert ask(cache) == old(cache) == cache.get_max_length(0) == expected


def test_iteration_depends_on_who_iterates() -> None:
    cache = filled(DynamicCache)
    assert {len(entry) for entry in cache} == {2}
    ask = as_transformers(lambda cache: [len(entry) for entry in cache])
    assert set(ask(cache)) == ({2} if transformers.__version__.startswith("4.") else {3})


@pytest.mark.parametrize("make", GROWING)
def test_counter_of_seen_tokens(make: Make) -> None:
    cache = filled(make)
    cache._seen_tokens += 2
    assert cache.seen_tokens == 7
    keys = torch.zeros(1, 2, 1, 4)
    for index in range(2):
        cache.update(keys, keys, index)
    assert (cache._seen_tokens, cache.get_seq_length()) == (8, 6)
    cache.crop(4)
    assert cache.seen_tokens == cache.get_seq_length() == 4


@pytest.mark.parametrize("make", GROWING)
def test_crop_to_a_size(make: Make) -> None:
    cache = filled(make)
    cache.crop(9)
    assert cache.get_seq_length() == 5
    cache.crop(3)
    assert cache.get_seq_length() == 3
    assert torch.equal(cache[0][0], pairs()[0][0][:, :, :3])
    cache.crop(-1)
    assert cache.get_seq_length() == 2
    cache.crop(0)
    assert cache.get_seq_length() == 0


def test_crop_means_to_transformers_what_it_meant() -> None:
    cache, mine = filled(DynamicCache), filled(lambda: mnemon.Cache(CONFIG))
    crop = as_transformers(lambda cache, size: cache.crop(size))
    if transformers.__version__.startswith("5.") and not transformers.__version__ < "5.14":
        crop(cache, 0)
        crop(mine, 0)
        assert cache.get_seq_length() == mine.get_seq_length() == 5


@pytest.mark.parametrize("make", OURS_ALSO)
def test_pairs_by_index_and_in_turn(make: Make) -> None:
    cache = filled(make)
    for index, (keys, values) in enumerate(cache):
        assert torch.equal(keys[:, :, :5], pairs()[index][0])
        assert torch.equal(values[:, :, :5], pairs()[index][1])
        assert torch.equal(cache[index][0], keys)
    assert torch.equal(cache[-1][1], values)
    assert cache[0][0].shape[2] >= 5
    with pytest.raises(KeyError, match="only has 2 layers"):
        cache[2]


def test_layers_that_hold_nothing_yet() -> None:
    for cache in (DynamicCache(config=CONFIG), mnemon.Cache(CONFIG)):
        assert cache[0] == (None, None)
        if transformers.__version__.startswith("4."):
            continue  # its own iteration gives the empty layers too
        assert [keys for keys, _ in cache] == []
        assert len(cache) == 0  # old code asks so whether there is a past
        assert not cache
        assert cache.to_legacy_cache() == ()


@pytest.mark.parametrize("cls", [DynamicCache, mnemon.Cache])
def test_there_and_back_without_a_copy(cls: Any) -> None:
    past = pairs()
    cache = cls.from_legacy_cache(past)
    assert cache.get_seq_length() == 5
    back = cache.to_legacy_cache()
    if cls is mnemon.Cache or not transformers.__version__.startswith("4."):
        for old, new in zip(past, back, strict=True):
            assert [t.data_ptr() for t in old] == [t.data_ptr() for t in new]
    for old, new in zip(past, back, strict=True):
        assert torch.equal(old[0], new[0])
    keys = torch.ones(1, 2, 1, 4)
    cache.update(keys, keys, 0)
    assert past[0][0].shape[2] == 5  # what it was made of is as it was
    assert cache[0][0].shape[2] == 6


def test_four_tensors_a_layer() -> None:
    past = tuple((*own, *cross) for own, cross in zip(pairs(tokens=3), pairs(), strict=True))
    for cache in (
        EncoderDecoderCache.from_legacy_cache(past),
        mnemon.Cache.from_legacy_cache(past),
    ):
        assert isinstance(cache, EncoderDecoderCache)
        assert cache.is_updated == {0: True, 1: True}
        assert len(cache[1]) == 4
        assert [len(entry) for entry in cache] == [4, 4]
        assert torch.equal(cache[1][3], past[1][3])
        back = cache.to_legacy_cache()
        assert [len(entry) for entry in back] == [4, 4]
        assert cache.seen_tokens == 3
    own = EncoderDecoderCache(DynamicCache(), DynamicCache())
    own.self_attention_cache.update(*past[0][:2], 0)
    assert [len(entry) for entry in own.to_legacy_cache()] == [2]


@pytest.mark.parametrize("make", PREALLOCATED)
def test_a_preallocated_cache_writes_where_it_is_told(make: Make) -> None:
    cache = make()
    for index, (keys, values) in enumerate(pairs()):
        cache.update(keys, values, index, {"cache_position": torch.arange(5)})
    again = torch.full((1, 2, 1, 4), 7.0)
    for index in range(2):
        held, _ = cache.update(again, again, index, {"cache_position": torch.tensor([3])})
        assert torch.equal(held[:, :, 3:4], again)
        assert torch.equal(held[:, :, :3], pairs()[index][0][:, :, :3])
    # A new prompt in the same memory, as loops of old did without a reset.
    for index, (keys, values) in enumerate(pairs(tokens=2)):
        held, _ = cache.update(keys, values, index, {"cache_position": torch.arange(2)})
        assert torch.equal(held[:, :, :2], keys)
    if isinstance(cache, mnemon.Cache) and not transformers.__version__.startswith("4."):
        with pytest.raises(CacheError, match="cache_position 8"):
            cache.update(again, again, 0, {"cache_position": torch.tensor([8])})


@pytest.mark.parametrize("make", GROWING)
def test_update_takes_what_it_took(make: Make) -> None:
    keys, values = pairs()[0]
    for extra in ({}, {"cache_kwargs": None}, {"cache_kwargs": {"sin": None, "cos": None}}):
        held, _ = make().update(keys, values, 0, **extra)
        assert torch.equal(held, keys)
    held, _ = make().update(keys, values, 0, {"cache_position": torch.arange(5) + 40})
    assert torch.equal(held, keys)  # a growing cache never looked at it


@pytest.mark.parametrize("home", ["transformers_modules.somebody", "transformers.models.other"])
def test_a_cache_class_of_old_keeps_its_own_lists(home: str) -> None:
    from transformers.cache_utils import Cache

    class Own(Cache):
        __module__ = home

        def __init__(self) -> None:
            if home.startswith("transformers."):
                super().__init__(layers=[])
            else:
                super().__init__()
            self.key_cache: list[torch.Tensor] = []
            self.value_cache: list[torch.Tensor] = []
            self._seen_tokens = 0

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any) -> Any:
            self._seen_tokens += key_states.shape[-2]
            self.key_cache.append(key_states)
            return key_states, value_states

        def get_seq_length(self, layer_idx: int | None = 0) -> int:
            return self._seen_tokens

        def get_max_length(self) -> int | None:
            return None

    Own.update.__module__ = home
    cache = Own()
    cache.update(*pairs()[0], 0)
    assert type(cache.key_cache) is list
    assert len(cache.key_cache) == 1
    assert (cache._seen_tokens, cache.seen_tokens, cache.get_usable_length(2)) == (5, 5, 5)
