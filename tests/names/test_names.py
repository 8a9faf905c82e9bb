"""The table of names: its entries, the page printed from it, and its messages, provoked."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from mnemon.errors import MnemonError
from mnemon.names import NAMES, Kind, lookup, release

ROOT = Path(__file__).parents[2]
HERE = version("transformers")
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
EAGER = LlamaConfig(num_hidden_layers=1, attn_implementation="eager")
STATES = torch.zeros(1, 2, 3, 8)
PAST = tuple((STATES, STATES) for _ in range(2))
IDS = torch.tensor([[3, 4, 5, 6]])


def dynamic() -> Any:
    cache = DynamicCache()
    for index in range(2):
        cache.update(STATES, STATES, index)
    return cache


def llama() -> Any:
    return LlamaForCausalLM(CONFIG).eval()


class Bare(PreTrainedModel):
    """What old remote code looks like: it expects `generate` from its base."""

    config_class = LlamaConfig


def importing(name: str, module: str = "transformers.cache_utils") -> Callable[[], Any]:
    return lambda: exec(f"from {module} import {name}", {})


# What users write, by the entry's key: it runs where the entry lived, and where it did not it
# raises one of the entry's messages.
USES: dict[str, list[Callable[[], Any]]] = {
    "seen_tokens": [lambda: dynamic().seen_tokens],
    "_seen_tokens": [lambda: dynamic()._seen_tokens],
    "get_usable_length": [lambda: dynamic().get_usable_length(1)],
    "get_max_length": [lambda: dynamic().get_max_length()],
    "get_max_cache_shape": [
        lambda: dynamic().get_max_cache_shape(),
        lambda: StaticCache(config=CONFIG, max_cache_len=8).get_max_cache_shape(),
    ],
    "max_cache_len": [lambda: StaticCache(config=CONFIG, max_cache_len=8).max_cache_len],
    "positive_crop": [lambda: dynamic().crop(2)],
    "key_cache": [lambda: dynamic().key_cache[0]],
    "value_cache": [lambda: dynamic().value_cache[0]],
    "cache[i]": [
        lambda: dynamic()[0],
        lambda: EncoderDecoderCache(dynamic(), dynamic())[0],
    ],
    "iteration": [
        lambda: [keys for keys, _ in dynamic()],
        lambda: [keys for keys, _ in StaticCache(config=CONFIG, max_cache_len=8)],
    ],
    "from_legacy_cache": [
        lambda: DynamicCache.from_legacy_cache(PAST),  # type: ignore[attr-defined]
        lambda: EncoderDecoderCache.from_legacy_cache(PAST),  # type: ignore[attr-defined]
    ],
    "to_legacy_cache": [lambda: dynamic().to_legacy_cache()],
    "batch_split": [lambda: dynamic().batch_split(1, 1)],
    "lazy_initialization": [lambda: dynamic().layers[0].lazy_initialization(STATES)],
    "activate_past_recording": [lambda: dynamic().activate_past_recording()],
    "GenerationMixin": [lambda: Bare(EAGER).generate(IDS)],
    "num_hidden_layers": [lambda: DynamicCache(num_hidden_layers=2)],  # type: ignore[call-arg]
    "tuple_to_generate": [lambda: llama().generate(IDS, past_key_values=PAST, max_new_tokens=1)],
    "return_legacy_cache": [
        lambda: llama().generate(IDS, return_legacy_cache=True, max_new_tokens=1)
    ],
    "is_torch_fx_available": [
        importing("is_torch_fx_available", "transformers.utils.import_utils")
    ],
    **{
        name.key: [importing(name.key, "transformers"), importing(name.key)]
        for name in NAMES
        if name.kind is Kind.CLASS and name.messages
    },
    # One was never at the top level; the other left cache_utils before it left.
    "OffloadedHybridCache": [importing("OffloadedHybridCache")],
    "MambaCache": [importing("MambaCache", "transformers")],
    # Back in one place only.
    "SlidingWindowCache": [importing("SlidingWindowCache")],
}
NOT_RUN = {"max_batch_size", "crop_zero", "cache_kwargs", "cache_position"}
NOT_RUN |= {
    "static_cache_arguments",
    "tuple_to_forward",
    "past_key_value",
}  # tests of their own, below


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [name.key for name in NAMES if name.key in USES])
def test_a_name_runs_or_raises_its_message(key: str) -> None:
    name = lookup(key)
    patterns = [re.escape(m.text).replace(r"\.\.\.", ".*") for m in name.messages]
    for use in USES[key]:
        if name.there_in(HERE):
            use()
            continue
        with pytest.raises((AttributeError, ImportError, TypeError, ValueError)) as caught:
            use()
        assert any(re.search(p, str(caught.value)) for p in patterns), str(caught.value)


def test_every_name_is_run() -> None:
    assert {name.key for name in NAMES} == USES.keys() | NOT_RUN


def test_a_tuple_given_to_forward() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    in_tuple, in_list = lookup("tuple_to_forward").messages[:2]
    for model in (llama(), bloom):
        with pytest.raises(AttributeError, match=in_tuple.text):
            model(IDS, past_key_values=PAST)
        with pytest.raises(AttributeError, match=in_list.text):
            model(IDS, past_key_values=list(PAST))


def test_static_cache_arguments() -> None:
    [message] = lookup("static_cache_arguments").messages
    with pytest.raises(TypeError, match=re.escape(message.text)):
        StaticCache(config=CONFIG, max_batch_size=1)  # type: ignore[call-arg]
    # What the entry says goes wrong silently: the second argument is the length.
    wrong: Any = StaticCache(CONFIG, 1, 2048)  # type: ignore[arg-type]
    assert wrong.layers[0].max_cache_len == 1
    assert wrong.offloading


def test_what_goes_wrong_silently() -> None:
    cache = dynamic()
    cache.crop(0)
    assert cache.get_seq_length() == (3 if release(HERE) >= (5, 14) else 0)
    assert bool(lookup("crop_zero").there_in(HERE)) == (release(HERE) < (5, 14))
    if not lookup("cache_position").there_in(HERE):
        length, _ = dynamic().get_mask_sizes(torch.arange(1), 0)
        assert isinstance(length, torch.Tensor)
        dynamic().update(STATES, STATES, 0, {"cache_position": torch.arange(3)})
    if release(HERE) >= (5, 6):
        from transformers.cache_utils import SlidingWindowCache

        assert SlidingWindowCache is StaticCache
    if release(HERE) >= (5, 20):
        static = StaticCache(config=CONFIG, max_cache_len=8)
        text = re.escape("'StaticCache' object has no attribute 'max_batch_size'")
        with pytest.raises(AttributeError, match=text):
            _ = static.max_batch_size
        static.update(STATES, STATES, 0)
        assert static.layers[0].batch_size == 1


@pytest.mark.filterwarnings("ignore:.past_key_value.:FutureWarning")
def test_the_singular_is_ignored() -> None:
    model, cache = llama(), DynamicCache()
    states = torch.zeros(1, 3, 32)
    rotation = model.model.rotary_emb(states, torch.arange(3)[None])
    model.model.layers[0](states, position_embeddings=rotation, past_key_value=cache)
    there = lookup("past_key_value").there_in(HERE)
    assert cache.get_seq_length() == (3 if there else 0)


def test_modern_spellings_run() -> None:
    """What the table says to write does what the old name did."""
    if release(HERE) < (5, 13):
        pytest.skip("the modern spellings are those of 5.13 and later")
    cache = dynamic()
    assert cache.get_seq_length() == 3
    assert cache.get_max_length() == -1
    assert DynamicCache(PAST).layers[1].keys.shape == STATES.shape
    assert DynamicCache(None).get_seq_length() == 0
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    assert pairs[0][0].shape == STATES.shape
    cache.crop(min(2 - cache.get_seq_length(), 0))
    assert cache.get_seq_length() == 2
    cache.crop(min(9 - cache.get_seq_length(), 0))
    assert cache.get_seq_length() == 2
    assert StaticCache(config=CONFIG, max_cache_len=8).get_max_length() == 8
    pair = EncoderDecoderCache(DynamicCache(PAST), DynamicCache(PAST))
    assert pair.self_attention_cache.get_seq_length() == 3


def test_the_table() -> None:
    assert len({name.key for name in NAMES}) == len(NAMES)
    for name in NAMES:
        assert name.modern
        assert name.meaning
        assert name.messages or name.silent, name.key
        for first, last in name.lived:
            assert last is None or release(first) <= release(last)
    assert lookup("get_max_length").there_in("4.44.2")
    assert not lookup("get_max_length").there_in("4.57.6")
    assert lookup("get_max_length").there_in("5.23.0")
    with pytest.raises(MnemonError, match="no entry 'nothing'"):
        lookup("nothing")


def test_the_page_is_what_the_table_says() -> None:
    script = ROOT / "scripts" / "names_page.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_import_neither_torch_nor_transformers() -> None:
    code = "import sys, mnemon.names; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
