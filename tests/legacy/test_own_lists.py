"""Old cache classes that keep lists of their own, in models of today."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

import mnemon
from mnemon.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore::mnemon.legacy.LegacyWarning")


class Lists(DynamicCache):
    """Fills lists of its own and leaves the rest to its base."""

    def __init__(self) -> None:
        super().__init__()
        self.key_cache: Any = []
        self.value_cache: Any = []
        self._seen_tokens = 0

    def update(self, keys: Any, values: Any, layer_idx: int, cache_kwargs: Any = None) -> Any:
        if layer_idx == 0:
            self._seen_tokens += keys.shape[-2]
        if len(self.key_cache) <= layer_idx:
            self.key_cache.append(keys)
            self.value_cache.append(values)
        else:
            self.key_cache[layer_idx] = torch.cat([self.key_cache[layer_idx], keys], dim=-2)
            self.value_cache[layer_idx] = torch.cat([self.value_cache[layer_idx], values], dim=-2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]


class Bare(Cache):
    """The same from the root class."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[call-arg]
        self.key_cache: Any = []
        self.value_cache: Any = []
        self._seen_tokens = 0

    update = Lists.update


class Parents(DynamicCache):
    """Uses the lists that its base had."""

    def update(self, keys: Any, values: Any, layer_idx: int, cache_kwargs: Any = None) -> Any:
        lists: Any = self
        if len(lists.key_cache) <= layer_idx:
            lists.key_cache.append(keys)
            lists.value_cache.append(values)
        else:
            lists.key_cache[layer_idx] = torch.cat([lists.key_cache[layer_idx], keys], dim=-2)
            lists.value_cache[layer_idx] = torch.cat([lists.value_cache[layer_idx], values], dim=-2)
        return lists.key_cache[layer_idx], lists.value_cache[layer_idx]


class Super(DynamicCache):
    """Changes what its base has stored."""

    def update(self, keys: Any, values: Any, layer_idx: int, cache_kwargs: Any = None) -> Any:
        keys, values = super().update(keys, values, layer_idx, cache_kwargs)
        lists: Any = self
        lists.key_cache[layer_idx] = lists.key_cache[layer_idx][:, :, -100:]
        return keys, values


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return made


IDS = torch.tensor([[5, 9, 17, 33, 8, 50]])
PADDED = {
    "input_ids": torch.tensor([[0, 0, 17, 33, 8, 50], [5, 9, 17, 33, 8, 51]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}
WAYS: list[dict[str, Any]] = [
    {"input_ids": IDS},
    {"input_ids": IDS, "num_beams": 3},
    PADDED,
    {"input_ids": IDS, "prompt_lookup_num_tokens": 2},
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cls", [Lists, Bare, Parents, Super])
def test_models_of_today_say_the_same(model: Any, cls: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    for way in WAYS:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | way
        expected = model.generate(**options, past_key_values=DynamicCache())
        with mnemon.legacy.enable():
            cache = cls()
            assert torch.equal(model.generate(**options, past_key_values=cache), expected)
            assert cache.get_seq_length() >= 6


@pytest.mark.parametrize("cls", [Lists, Bare, Parents])
def test_a_prompt_in_two_parts(model: Any, cls: Any) -> None:
    with torch.no_grad(), mnemon.legacy.enable():
        whole = model(IDS).logits[:, 3:]
        cache = cls()
        model(IDS[:, :3], past_key_values=cache)
        assert torch.allclose(model(IDS[:, 3:], past_key_values=cache).logits, whole, atol=1e-5)
        seen = 0 if cls is Parents else 6  # nobody counts where `update` does not
        assert (cache.get_seq_length(), len(cache), cache.seen_tokens) == (6, 2, seen)
        assert cache.get_max_length() is None
        assert cache.get_usable_length(3) == 6
        cache.crop(4)
        assert cache.get_seq_length() == 4
        assert [keys.shape[2] for keys, _ in cache] == [4, 4]
        assert cache[1][0].shape[2] == 4
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0]))
        assert cache[0][0].shape[0] == 1
        cache.reset()
        # What a DynamicCache's own reset leaves differs from release to release.
        assert cls is Parents or cache.get_seq_length() == 0


def test_from_legacy_cache_goes_through_update() -> None:
    past = tuple((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)) for _ in range(2))
    with mnemon.legacy.enable():
        cache: Any = Lists.from_legacy_cache(past)  # type: ignore[attr-defined]
        assert cache._seen_tokens == 3
        assert len(cache.key_cache) == 2


@pytest.mark.parametrize("make", [DynamicCache, lambda: mnemon.Cache(LlamaConfig())])
def test_the_counter_goes_on(make: Any) -> None:
    states = torch.ones(1, 32, 4, 128)
    with mnemon.legacy.enable():
        cache = make()
        cache.update(states, states, 0)
        cache.seen_tokens = 3
        cache.update(states[:, :, :2], states[:, :, :2], 0)
        assert cache.seen_tokens == cache._seen_tokens == 5
        cache.reset()
        assert cache.seen_tokens in (0, cache.get_seq_length())


def test_half_written_sides_are_not_copied() -> None:
    states = torch.ones(1, 32, 4, 128)
    cache: Any = mnemon.Cache(LlamaConfig(num_hidden_layers=1))
    cache.update(states, states, 0)
    with mnemon.legacy.enable():
        cache.key_cache[0] = cache.key_cache[0][:, :, :2]
        for ask in (cache.fork, lambda: copy.deepcopy(cache)):
            with pytest.raises(CacheError, match="Assign both"):
                ask()
        cache.value_cache[0] = cache.value_cache[0][:, :, :2]
        assert cache.fork().num_tokens == 2


def test_windows_that_grow_are_no_bound() -> None:
    from transformers import MistralConfig

    config = MistralConfig(sliding_window=4, num_hidden_layers=1)
    with mnemon.legacy.enable():
        for cache in (DynamicCache(config=config), mnemon.Cache(config)):
            asked: Any = cache
            assert asked.get_usable_length(7) == 0
            assert asked.get_max_length() is None
