"""`key_cache` and `value_cache`: lists of tensors that are read and written."""

from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

import mnemon
from mnemon.errors import CacheError, MnemonError, UnsupportedVerb

from .conftest import pairs
from .test_names import CONFIG, GROWING, Make, filled

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("make", GROWING)
def test_reading(make: Make) -> None:
    cache = filled(make)
    assert len(cache.key_cache) == len(cache.value_cache) == 2
    assert torch.equal(cache.key_cache[1], pairs()[1][0])
    assert torch.equal(cache.value_cache[-1], pairs()[1][1])
    assert [keys.shape[-2] for keys in cache.key_cache] == [5, 5]
    assert len(cache.key_cache[:1]) == 1
    with pytest.raises(IndexError):
        cache.key_cache[2]
    assert len(make().key_cache) == 0
    assert not make().key_cache


@pytest.mark.parametrize("make", GROWING)
def test_writing_goes_to_the_layer(make: Make) -> None:
    cache = filled(make)
    new = torch.ones(1, 2, 5, 4)
    cache.key_cache[0] = new
    keys, values = cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert torch.equal(keys[:, :, :5], new)
    assert torch.equal(values[:, :, :5], pairs()[0][1])
    assert torch.equal(new, torch.ones(1, 2, 5, 4))


@pytest.mark.parametrize("make", GROWING)
def test_one_side_after_the_other(make: Make) -> None:
    cache = filled(make)
    for index in range(2):
        cache.key_cache[index] = cache.key_cache[index][:, :, 1:]
        assert cache.key_cache[index].shape[2] == 4
        cache.value_cache[index] = cache.value_cache[index][:, :, 1:]
    assert cache.get_seq_length() == cache.get_seq_length(1) == 4
    keys, values = cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 1)
    assert keys.shape[2] == values.shape[2] == 5


def test_half_a_write_is_not_used() -> None:
    cache = filled(lambda: mnemon.Cache(CONFIG))
    cache.key_cache[0] = cache.key_cache[0][:, :, 1:]
    with pytest.raises(CacheError, match="Assign both"):
        cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)


@pytest.mark.parametrize("make", GROWING)
def test_appending_and_assigning_whole(make: Make) -> None:
    cache = make()
    for keys, values in pairs():
        cache.key_cache.append(keys)
        cache.value_cache.append(values)
    assert cache.get_seq_length() == 5
    assert torch.equal(cache[1][1], pairs()[1][1])
    cache.key_cache = [keys.repeat(3, 1, 1, 1) for keys in cache.key_cache]
    cache.value_cache = [values.repeat(3, 1, 1, 1) for values in cache.value_cache]
    assert cache[0][0].shape[0] == cache[1][1].shape[0] == 3
    cache.key_cache = []
    cache.value_cache = []
    assert cache.get_seq_length() == 0
    assert len(cache.key_cache) == 0


@pytest.mark.parametrize("make", GROWING)
def test_moving(make: Make) -> None:
    cache = filled(make)
    for index in range(len(cache.key_cache)):
        cache.key_cache[index] = cache.key_cache[index].to("cpu")
    assert cache.key_cache.to(torch.float64)[0].dtype == torch.float64
    assert cache.value_cache.to(torch.float64)[0].dtype == torch.float64
    assert cache.get_seq_length() == 5


def test_a_fork_keeps_its_numbers() -> None:
    cache = filled(lambda: mnemon.Cache(CONFIG))
    other = cache.fork()
    cache.key_cache[0] = torch.ones(1, 2, 5, 4)
    assert torch.equal(other[0][0], pairs()[0][0])


def test_what_cannot_be_written_says_so() -> None:
    window = transformers.MistralConfig(**{**CONFIG.to_dict(), "sliding_window": 3})
    for cache in (mnemon.Cache(window), mnemon.Cache(CONFIG, "static(9)")):
        filled_cache = filled(lambda cache=cache: cache)
        with pytest.raises(UnsupportedVerb, match="cannot be written by hand"):
            filled_cache.key_cache[0] = torch.ones(1, 2, 5, 4)
    static = filled(lambda: StaticCache(config=CONFIG, max_cache_len=9))
    with pytest.raises(UnsupportedVerb, match="shape it has"):
        static.key_cache[0] = torch.ones(1, 2, 5, 4)
    static.key_cache[0] = torch.ones(1, 2, 9, 4)
    assert torch.equal(static.layers[0].keys, torch.ones(1, 2, 9, 4))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.key_cache.__setitem__(0, torch.ones(3)), r"\[batch, kv_heads"),
        (lambda c: c.key_cache.__delitem__(0), "one side at a time"),
        (lambda c: c.key_cache.insert(0, torch.ones(1, 2, 5, 4)), "at the end"),
        (lambda c: setattr(c, "key_cache", [torch.ones(1, 2, 5, 4)]), "one for each"),
    ],
)
def test_what_lists_of_layers_cannot_do(act: Any, message: str) -> None:
    with pytest.raises(MnemonError, match=message):
        act(filled(DynamicCache))


def test_more_layers_than_the_model_has() -> None:
    cache = filled(lambda: mnemon.Cache(CONFIG))
    with pytest.raises(CacheError, match="has 2 layers"):
        cache.key_cache.append(torch.ones(1, 2, 5, 4))


def test_a_pair_has_two_caches() -> None:
    cache = EncoderDecoderCache(filled(DynamicCache), DynamicCache())
    with pytest.raises(CacheError, match="self_attention_cache"):
        _ = cache.key_cache
    assert len(cache.self_attention_cache.key_cache) == 2


def test_quantized_numbers_do_not_lie_there() -> None:
    cache_utils = transformers.cache_utils
    if transformers.__version__.startswith("4."):
        pytest.skip("4.57 has indexing of its own")

    class Coarse(cache_utils.QuantizedLayer):
        def __init__(self) -> None:
            cache_utils.DynamicLayer.__init__(self)
            self.nbits, self.axis_key, self.axis_value = 4, 0, 0
            self.q_group_size, self.residual_length, self.cumulative_length = 4, 2, 0
            self._pending_beam_idx = None

        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor.half()

        def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
            return q_tensor.float()

    cache = cache_utils.Cache(layers=[Coarse()])
    cache.update(*pairs()[0], 0)
    with pytest.raises(UnsupportedVerb, match="quantized"):
        cache[0]
