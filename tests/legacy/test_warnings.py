"""Each name warns once, at the line that used it, and says what to write today."""

import functools
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import mnemon
from mnemon.names import NAMES, lookup

from .conftest import pairs

OLD = transformers.__version__.startswith("4.")
USES = {
    "seen_tokens": lambda cache: cache.seen_tokens,
    "_seen_tokens": lambda cache: cache._seen_tokens,
    "get_usable_length": lambda cache: cache.get_usable_length(1),
    "get_max_length": lambda cache: cache.get_max_length(),
    "get_max_cache_shape": lambda cache: cache.get_max_cache_shape(),
    "key_cache": lambda cache: cache.key_cache,
    "value_cache": lambda cache: cache.value_cache,
    "cache[i]": lambda cache: cache[0],
    "iteration": lambda cache: list(cache),
    "to_legacy_cache": lambda cache: cache.to_legacy_cache(),
    "from_legacy_cache": lambda cache: type(cache).from_legacy_cache(pairs()),
    "cache_kwargs": lambda cache: cache.update(*pairs()[0], 0, {"sin": None}),
    "positive_crop": lambda cache: cache.crop(3),
    "crop_zero": lambda cache: cache.crop(0),
    "SinkCache": lambda cache: transformers.cache_utils.SinkCache(4, 1),
    "OffloadedCache": lambda cache: transformers.cache_utils.OffloadedCache(),
    "is_torch_fx_available": lambda cache: transformers.utils.is_torch_fx_available(),
}


def warned(act: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [w for w in caught if issubclass(w.category, mnemon.legacy.LegacyWarning)]


@pytest.mark.parametrize("key", USES)
def test_once_per_name(key: str) -> None:
    name = lookup(key)
    # From 4.53 to 4.57 SinkCache is there, and can only raise.
    gone = not name.there_in(transformers.__version__) or key in ("get_max_length", "SinkCache")
    if not gone and key == "OffloadedCache":
        pytest.skip("the release makes it itself, for CUDA")
    for _ in range(2):  # switched on again, it warns again
        with mnemon.legacy.enable():
            cache = DynamicCache()
            for index, (keys, values) in enumerate(pairs()):
                cache.update(keys, values, index)
            first = warned(lambda cache=cache: USES[key](cache))
            assert len(first) == int(gone)
            if first:
                assert name.modern in str(first[0].message)
                assert first[0].filename == __file__
            assert not warned(lambda cache=cache: USES[key](cache))


@pytest.mark.skipif(OLD, reason="4.57 takes tuples itself")
def test_tuples_warn_at_the_line_that_passes_them() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=32, vocab_size=32, eos_token_id=2
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[5, 9, 13, 17, 21, 25]])
    past = pairs(heads=4)
    for key, act in (
        ("tuple_to_forward", lambda: model(ids[:, -1:], past_key_values=past)),
        ("tuple_to_generate", lambda: model.generate(ids, past_key_values=past, max_new_tokens=2)),
    ):
        with mnemon.legacy.enable():
            (warning,) = warned(act)
            assert lookup(key).modern in str(warning.message)
            assert warning.filename == __file__


def test_todays_code_is_not_warned() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, eos_token_id=2,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[5, 9, 13]])
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with mnemon.legacy.enable():
        for arguments in (
            {},
            {"past_key_values": mnemon.Cache(config)},
            {"prompt_lookup_num_tokens": 2},
            {"cache_implementation": "static"},
        ):
            tokens: list[Any] = []
            use = functools.partial(
                model.generate, ids, max_new_tokens=4, do_sample=False, **arguments
            )
            assert not warned(lambda use=use, tokens=tokens: tokens.append(use()))
            assert torch.equal(tokens[0], plain)


def test_every_use_is_in_the_table() -> None:
    assert set(USES) <= {name.key for name in NAMES}
    assert issubclass(mnemon.legacy.LegacyWarning, FutureWarning)
