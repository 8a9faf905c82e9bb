"""Caches as pytrees: the same tensors there and back, no operator, nothing left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as trees
from tests.export.tiny import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, JambaConfig, StaticCache

import mnemon
from mnemon.errors import ExportError
from mnemon.export import pytrees


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran")


def filled(name: str) -> Any:
    if name == "jamba":
        config = JambaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=4,
        )
        import transformers

        model: Any = transformers.JambaForCausalLM(config).eval()
        cache: Any = mnemon.Cache(config)
    else:
        kind, _, arch = name.partition(" ")
        model = build(arch)
        config = model.config
        makers = {
            "mnemon": lambda: mnemon.Cache(config),
            "static": lambda: mnemon.Cache(config, "static(32)"),
            "int4": lambda: mnemon.Cache(config, "int4(residual=4)"),
            "int8/int2": lambda: mnemon.Cache(config, "int8/int2"),
            "DynamicCache": lambda: DynamicCache(config=config),
            "StaticCache": lambda: StaticCache(config, max_cache_len=32),
            "EncoderDecoderCache": lambda: EncoderDecoderCache(
                DynamicCache(config=config), DynamicCache(config=config)
            ),
        }
        cache = makers[kind]()
    length = 90 if name.startswith("int4") else 7  # with blocks, or a tail alone
    inputs = {"input_ids": torch.randint(3, 50, (2, length))}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return model, cache


NAMES = [
    "mnemon llama",
    "mnemon gemma3",
    "mnemon bart",
    "static llama",
    "static mistral",
    "int4 llama",
    "int8/int2 bart",
    "jamba",
    "DynamicCache llama",
    "DynamicCache gemma3",
    "StaticCache llama",
    "EncoderDecoderCache bart",
]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    model, cache = filled(name)
    with pytrees():
        leaves, spec = trees.tree_flatten(cache)
        again, same_spec = trees.tree_flatten(cache)
        assert leaves
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert all(one is other for one, other in zip(leaves, again, strict=True))
        assert spec == same_spec
        with NoOperators():
            rebuilt = trees.tree_unflatten(leaves, spec)
        assert type(rebuilt) is type(cache)
        back, last_spec = trees.tree_flatten(rebuilt)
        assert all(one is other for one, other in zip(leaves, back, strict=True))
        assert last_spec == spec
    new = {"input_ids": torch.tensor([[5], [6]])}
    if model.config.is_encoder_decoder:
        new = {
            "decoder_input_ids": new["input_ids"],
            "encoder_outputs": (torch.zeros(2, 7, model.config.d_model),),
        }
    with pytrees():  # steps write in place: each of the two caches has tensors of its own
        own = trees.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    with torch.no_grad():
        found = model(**new, past_key_values=own).logits
        expected = model(**new, past_key_values=cache).logits  # the original
    torch.testing.assert_close(found, expected)
    assert int(own.get_seq_length()) == int(cache.get_seq_length())


@pytest.mark.parametrize("name", ["mnemon mistral", "DynamicCache mistral"])
def test_windows_that_forgot_are_refused(name: str) -> None:
    _, cache = filled(name)
    with pytrees(), pytest.raises(ExportError, match="forgot tokens"):
        trees.tree_flatten(cache)


def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """Every class, in one other process: leaves without pickles of classes, the tree as JSON."""
    expected = []
    for index, name in enumerate(NAMES):
        _, cache = filled(name)
        with pytrees():
            leaves, spec = trees.tree_flatten(cache)
            torch.save(leaves, tmp_path / f"{index}.pt")
            (tmp_path / f"{index}.json").write_text(trees.treespec_dumps(spec))
        expected.append([type(cache).__name__, str(int(cache.get_seq_length()))])
    code = (
        "import sys, torch, torch.utils._pytree as trees\n"
        "from pathlib import Path\n"
        "from mnemon.export import pytrees\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"for index in range({len(NAMES)}):\n"
        "    leaves = torch.load(folder / f'{index}.pt', weights_only=True)\n"
        "    with pytrees():\n"
        "        spec = trees.treespec_loads((folder / f'{index}.json').read_text())\n"
        "        cache = trees.tree_unflatten(leaves, spec)\n"
        "    print(type(cache).__name__, int(cache.get_seq_length()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split() for line in done.stdout.splitlines()] == expected


def test_registries_are_as_before_also_on_failure() -> None:
    registries = (
        trees.SUPPORTED_NODES,
        trees.SUPPORTED_SERIALIZED_TYPES,
        trees.SERIALIZED_TYPE_TO_PYTHON_TYPE,
    )
    before = [dict(registry) for registry in registries]

    def fail() -> None:
        with pytrees():
            assert mnemon.Cache in trees.SUPPORTED_NODES
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [dict(registry) for registry in registries] == before


def test_what_has_no_form_says_so() -> None:
    model = build("llama")
    cache = mnemon.Cache(model.config, "disk")
    with torch.no_grad():
        model(torch.ones((1, 5), dtype=torch.int64), past_key_values=cache)
    with pytrees(), pytest.raises(ExportError, match="no form as plain tensors"):
        trees.tree_flatten(cache)


def test_packed_windows_that_begin_inside_a_block() -> None:
    model = build("gemma3")
    model.config.sliding_window = 100
    cache = mnemon.Cache(model.config, "int4(residual=4)")
    with torch.no_grad():
        model(torch.ones((1, 90), dtype=torch.int64), past_key_values=cache)
    with pytrees():
        leaves, spec = trees.tree_flatten(cache)
        assert trees.tree_unflatten(leaves, spec).get_seq_length() == 90
    with torch.no_grad():
        model(torch.ones((1, 20), dtype=torch.int64), past_key_values=cache)
    with pytrees(), pytest.raises(ExportError, match="inside a block"):
        trees.tree_flatten(cache)
