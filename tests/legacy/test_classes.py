"""Cache classes that are gone."""

from typing import Any

import pytest
import torch
import transformers
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, StaticCache

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.legacy import sink

from .conftest import pairs
from .test_names import CONFIG, filled

pytestmark = pytest.mark.usefixtures("enabled")
OLD = transformers.__version__.startswith("4.")  # where most are still there
MIXED = transformers.Gemma2Config(
    **{
        **CONFIG.to_dict(),
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
)


@pytest.mark.parametrize(
    "name",
    [
        "HybridCache", "HybridChunkedCache", "SlidingWindowCache", "OffloadedStaticCache",
        "OffloadedCache", "QuantoQuantizedCache", "HQQQuantizedCache", "SinkCache",
        "QuantizedCacheConfig",
    ],
)  # fmt: skip
def test_they_can_be_imported_from_both_places(name: str) -> None:
    assert getattr(cache_utils, name) is not None
    if name != "QuantizedCacheConfig" or not OLD:
        assert getattr(transformers, name) is getattr(cache_utils, name)


@pytest.mark.parametrize(
    "arguments",
    [
        ((), {"max_cache_len": 9}),
        ((), {"max_batch_size": 1, "max_cache_len": 9, "device": "cpu", "dtype": torch.float32}),
        ((), {"batch_size": 1, "max_cache_len": 9}),
        ((1, 9, "cpu"), {}),
        ((1, 9), {"dtype": torch.float32}),
    ],
)
@pytest.mark.parametrize("name", ["HybridCache", "HybridChunkedCache", "OffloadedStaticCache"])
@pytest.mark.skipif(OLD, reason="the release has them itself")
def test_preallocated_by_the_arguments_of_any_release(name: str, arguments: Any) -> None:
    args, kwargs = arguments
    cache = getattr(cache_utils, name)(MIXED, *args, **kwargs)
    assert isinstance(cache, StaticCache)
    assert cache.get_max_length() == 9
    assert cache.is_sliding == [True, False]
    keys, values = pairs(tokens=3)[0]
    held, _ = cache.update(keys, values, 1, {"cache_position": torch.arange(3)})
    assert held.shape[-2] == 9


@pytest.mark.skipif(OLD, reason="the release has them itself")
def test_one_number_may_be_either() -> None:
    with pytest.raises(CacheError, match="max_cache_len=n"):
        cache_utils.HybridCache(MIXED, 9)
    with pytest.raises(CacheError, match="got \\['size'\\]"):
        cache_utils.HybridCache(MIXED, size=9)
    with pytest.raises(CacheError, match="number of tokens"):
        cache_utils.HybridCache(MIXED, max_cache_len=0)
    assert cache_utils.HybridCache(MIXED, max_batch_size=1).get_max_length() == 64


@pytest.mark.skipif(OLD, reason="the release has them itself")
def test_what_generate_makes_counts_as_what_it_was() -> None:
    mixed, plain = (StaticCache(config=c, max_cache_len=9) for c in (MIXED, CONFIG))
    assert isinstance(mixed, cache_utils.HybridCache)
    assert not isinstance(plain, cache_utils.HybridCache)
    assert not isinstance(DynamicCache(), cache_utils.HybridCache)
    assert not isinstance(mixed, cache_utils.SlidingWindowCache)


@pytest.mark.skipif(OLD, reason="needs CUDA there")
def test_offloaded_without_an_accelerator_is_plain() -> None:
    if torch.cuda.is_available():
        pytest.skip("offloads here")
    cache = filled(cache_utils.OffloadedCache)
    assert isinstance(cache, DynamicCache)
    assert torch.equal(cache[0][0], pairs()[0][0])


@pytest.mark.skipif(OLD, reason="the release has them itself")
def test_quantized_takes_the_models_config() -> None:
    settings = cache_utils.QuantizedCacheConfig(nbits=4)
    assert settings.settings == {"nbits": 4}
    with pytest.raises(CacheError, match=r"config=model\.config"):
        cache_utils.QuantoQuantizedCache(settings)


def table(num: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    speeds = 100.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(num)[:, None] * speeds
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = keys.shape[-1] // 2
    return keys * cos + torch.cat((-keys[..., half:], keys[..., :half]), dim=-1) * sin


@pytest.mark.parametrize("whole_table", [False, True])
@pytest.mark.parametrize("partial", [None, 4])
def test_sinks_hold_what_was_computed_at_their_places(
    whole_table: bool, partial: int | None
) -> None:
    torch.manual_seed(0)
    window, sinks, width, total = 6, 2, 8, 13
    turning = partial or width
    cos, sin = table(window, turning)
    raw = torch.randn(1, 2, total, width)

    def turned(keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        front = rotate(keys[..., :turning], cos[places], sin[places])
        return torch.cat((front, keys[..., turning:]), dim=-1)

    cache = sink.SinkCache(window, sinks)
    for step in range(total):
        place = torch.tensor([min(step, window - 1)])
        given = {"partial_rotation_size": partial} if partial else {}
        if whole_table:
            given |= {"cos": cos, "sin": sin}
        else:
            given |= {"cos": cos[place][None], "sin": sin[place][None]}
        new = raw[:, :, step : step + 1]
        for layer in range(2):
            keys, values = cache.update(turned(new, place), new, layer, given)
    kept = torch.cat([torch.arange(sinks), torch.arange(total - window + sinks, total)])
    assert torch.equal(values, raw[:, :, kept])
    expected = turned(raw[:, :, kept], torch.arange(window))
    assert torch.allclose(keys, expected, atol=1e-5)
    assert (cache.get_seq_length(), cache.seen_tokens, cache.get_max_length()) == (6, 13, 6)


def test_sinks_need_cos_and_sin() -> None:
    cache = sink.SinkCache(6, 2)
    cache.update(*pairs()[0], 0)
    with pytest.raises(CacheError, match="cos and sin"):
        cache.update(*pairs()[0], 0)
    with pytest.raises(UnsupportedVerb, match="take tokens back"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="num_sink_tokens"):
        sink.SinkCache(2, 2)
    cache.reset()
    assert (cache.get_seq_length(), cache.seen_tokens) == (0, 0)
    assert isinstance(cache, cache_utils.SinkCache)
