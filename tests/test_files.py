"""A cache comes back from its file as it was, for the model that filled it and no other."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import xxhash

import mnemon
from matrix.architectures import rows
from mnemon.cache import Cache, CacheState
from mnemon.errors import (
    DamagedFile,
    FileError,
    ModelError,
    NewerVersion,
    NotACacheFile,
    TruncatedFile,
    UnsafeFile,
    WrongModel,
)
from mnemon.files import header, load_cache, read_summary, save_cache, tensors
from mnemon.layers.base import LayerState

ARCHITECTURES = {
    "llama": {"dense"},
    "bloom": {"dense"},
    "mistral": {"window"},
    "gemma2": {"dense", "window"},
    "llama4_text": {"dense", "window"},
    "deepseek_v3": {"dense"},
    "deepseek_v32": {"hybrid"},
    "deepseek_v4": {"foreign", "window"},
    "mamba": {"recurrent"},
    "jamba": {"dense", "recurrent"},
    "falcon_h1": {"hybrid"},
    "qwen3_next": {"dense", "recurrent"},
    "nemotron_h": {"dense", "recurrent", "shared"},
    "gemma4_text": {"dense", "window", "shared"},
    "gemma3": {"dense", "window"},
    "bart": {"dense", "cross"},
    "t5": {"dense", "cross"},
    "t5gemma": {"dense", "window", "cross"},
}
STATIC = ("llama", "gemma2", "deepseek_v32", "jamba", "bart")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level, num_threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(level)
    torch.set_num_threads(num_threads)


@cache
def built(name: str) -> tuple[Any, Any]:
    if name not in rows():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return rows()[name].build()


def filled(name: str, recipe: str = "", batch: int = 2, padding: int = 3) -> tuple[Any, Cache]:
    """A model and a cache that it filled with a padded batch, tokens known."""
    model, make_inputs = built(name)
    cache = Cache(model.config, recipe)
    argument = "cache_params" if name == "mamba" else "past_key_values"
    inputs = make_inputs(batch, 17, padding) | {argument: cache}
    with mnemon.attach(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models' own remarks on tiny configs
        model(**inputs, use_cache=True)
    return model, cache


@cache
def llama() -> tuple[Any, Cache]:
    return filled("llama")


def assert_same(loaded: Cache, saved: Cache) -> None:
    assert type(loaded) is type(saved)
    assert loaded.recipe == saved.recipe
    assert loaded.num_tokens == saved.num_tokens
    assert loaded.num_stored == saved.num_stored
    assert loaded.batch_size == saved.batch_size
    assert loaded.nbytes == saved.nbytes
    assert loaded.num_known_tokens == saved.num_known_tokens
    assert torch.equal(loaded.attention_mask(), saved.attention_mask())
    got, expected = loaded.to_state(), saved.to_state()
    assert torch.equal(got.tokens, expected.tokens)
    assert got.tokens.dtype == torch.int64
    assert got.meta == expected.meta
    for one, other in zip(
        [*got.layers, *got.cross], [*expected.layers, *expected.cross], strict=True
    ):
        assert_same_layer(one, other)


def assert_same_layer(got: LayerState, expected: LayerState) -> None:
    assert got.kind == expected.kind
    assert dict(got.meta) == dict(expected.meta)
    assert list(got.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert got.tensors[name].shape == tensor.shape
        assert bits(got.tensors[name]) == bits(tensor), name
    for one, other in zip(got.parts, expected.parts, strict=True):
        assert_same_layer(one, other)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def kinds(state: CacheState) -> set[str]:
    return {layer.kind for layer in (*state.layers, *state.cross)}


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["eager", "lazy"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_layer_round_trips(tmp_path: Path, name: str, verify: Any) -> None:
    model, cache = filled(name)
    assert kinds(cache.to_state()) == ARCHITECTURES[name]
    save_cache(cache, tmp_path / "file", model=model)
    assert_same(load_cache(tmp_path / "file", model, verify=verify), cache)


@pytest.mark.parametrize("name", STATIC)
def test_static_layers_round_trip(tmp_path: Path, name: str) -> None:
    model, cache = filled(name, "static(40)")
    save_cache(cache, tmp_path / "file", model=model)
    loaded = load_cache(tmp_path / "file", model)
    assert_same(loaded, cache)
    assert str(loaded.recipe) == "static(40)"


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "jamba", "deepseek_v32", "bart"])
def test_a_loaded_cache_goes_on_as_the_saved_one(
    tmp_path: Path, name: str, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bits in the logits of the next tokens; the file does not change."""
    if mapped:
        monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    model, cache = filled(name, padding=0)
    path = tmp_path / "file"
    save_cache(cache, path, model=model)
    before = path.read_bytes()
    loaded = load_cache(path, model)
    for step in range(3):
        outputs = [go_on(model, c, step) for c in (cache, loaded)]
        assert torch.equal(*outputs)
    assert_same(loaded, cache)
    assert path.read_bytes() == before


def go_on(model: Any, cache: Cache, step: int) -> torch.Tensor:
    ids = torch.arange(10 + step, 14 + step).view(2, 2)
    length = cache.num_tokens
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2, length + 2, dtype=torch.int64)}
    name = "input_ids"
    if model.config.is_encoder_decoder:
        name = "decoder_input_ids"
        hidden = torch.zeros(2, 17, model.config.d_model)
        inputs = {"encoder_outputs": (hidden,)}
    with torch.no_grad():
        logits: torch.Tensor = model(**{name: ids}, past_key_values=cache, **inputs).logits
    return logits


@pytest.mark.parametrize("verify", ["eager", "lazy"])
def test_verbs_on_a_loaded_cache(tmp_path: Path, verify: Any) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    verbs: dict[str, Callable[[Cache], Any]] = {
        "crop": lambda c: c.crop(-5),
        "reorder": lambda c: c.reorder(torch.tensor([1, 0])),
        "select": lambda c: c.select(torch.tensor([1])),
        "repeat": lambda c: c.repeat(3),
        "reset": lambda c: c.reset(),
        "fork": lambda c: c.fork().crop(-2),
    }
    for name, verb in verbs.items():
        loaded, expected = load_cache(tmp_path / "file", model, verify=verify), cache.fork()
        verb(loaded)
        verb(expected)
        assert_same(loaded, expected), name
    others = [load_cache(tmp_path / "file", model, verify=verify) for _ in range(2)]
    assert_same(Cache.merge(others), Cache.merge([cache, cache]))
    assert_same(others[0].extract(1), cache.extract(1))
    model, cache = filled("llama", padding=0)  # keep() would uncover padding
    save_cache(cache, tmp_path / "plain", model=model)
    loaded = load_cache(tmp_path / "plain", model, verify=verify)
    for one in (loaded, cache):
        one.keep(torch.tensor([0, 2, 5]))
    assert_same(loaded, cache)


def test_beams_on_a_loaded_cache(tmp_path: Path) -> None:
    model, cache = filled("llama", batch=1, padding=0)
    save_cache(cache, tmp_path / "file", model=model)
    ids = torch.cat([cache.tokens, torch.tensor([[5, 6]])], dim=1)
    outputs = []
    with mnemon.attach(model):
        for held in (cache.fork(), load_cache(tmp_path / "file", model)):
            outputs.append(
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=held,
                    num_beams=3,
                    max_new_tokens=6,
                    do_sample=False,
                )
            )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["llama", "mistral", "jamba", "deepseek_v4", "bart"])
def test_an_empty_cache_round_trips(tmp_path: Path, name: str) -> None:
    model, _ = built(name)
    cache = Cache(model.config)
    save_cache(cache, tmp_path / "file", model=model)
    loaded = load_cache(tmp_path / "file", model)
    assert_same(loaded, cache)
    assert loaded.num_tokens == 0


def test_unknown_tokens_and_padding_round_trip(tmp_path: Path) -> None:
    model, cache = filled("llama")
    assert (cache.tokens == -2).any()
    hand = Cache(model.config)
    for index in range(len(hand.layers)):
        hand.update(torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), index)
    hand.record_tokens(torch.tensor([[9], [8]]), None, 6)
    for index in range(len(hand.layers)):
        hand.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), index)
    assert hand.tokens.tolist() == [[-1] * 6 + [9], [-1] * 6 + [8]]
    for one in (cache, hand):
        save_cache(one, tmp_path / "file", model=model)
        assert_same(load_cache(tmp_path / "file", model), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = built("llama")[0].to(dtype)
    try:
        cache = Cache(model.config)
        with torch.no_grad():
            model(torch.arange(4, 12).view(1, 8), past_key_values=cache)
        save_cache(cache, tmp_path / "file", model=model)
        loaded = load_cache(tmp_path / "file", model)
        assert_same(loaded, cache)
        assert read_summary(tmp_path / "file").dtype == str(dtype).removeprefix("torch.")
    finally:
        model.float()


def test_save_is_a_method_and_load_cache_is_public(tmp_path: Path) -> None:
    model, cache = llama()
    cache.save(tmp_path / "file", model=model)
    cache.save(str(tmp_path / "file"), model=model)
    assert_same(mnemon.load_cache(str(tmp_path / "file"), model), cache)
    assert os.listdir(tmp_path) == ["file"]


def test_saving_again_over_the_loaded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat loads its file, goes on and saves to it: the mapping outlives the old file."""
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    model, cache = llama()
    expected = cache.fork()
    save_cache(cache, tmp_path / "file", model=model)
    for step in range(3):
        loaded = load_cache(tmp_path / "file", model)
        go_on(model, loaded, step)
        go_on(model, expected, step)
        loaded.save(tmp_path / "file")  # the weights are known from loading
    assert_same(load_cache(tmp_path / "file", model), expected)


def test_any_safetensors_reader_sees_the_numbers(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    loaded = safetensors.torch.load_file(tmp_path / "file")
    view = cache.layers[1].view()
    assert view is not None
    assert torch.equal(loaded["layers.1.keys"], view[0])
    assert torch.equal(loaded["layers.1.values"], view[1])
    assert torch.equal(loaded["tokens"], cache.tokens.int())


# -- wrong models --------------------------------------------------------------------------------


def test_other_weights(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    other = type(model)(model.config)
    with pytest.raises(WrongModel, match="same config and dtype, but other weights"):
        load_cache(tmp_path / "file", other)


def test_weights_are_known_through_attach(tmp_path: Path) -> None:
    model, cache = filled("llama")
    cache.save(tmp_path / "file")
    assert read_summary(tmp_path / "file").has_weights_hash
    with pytest.raises(WrongModel, match="other weights"):
        load_cache(tmp_path / "file", type(model)(model.config))


def test_other_config(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    layers = model.config.num_hidden_layers
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers + 1})
    with pytest.raises(WrongModel, match=f"num_hidden_layers {layers} against {layers + 1}"):
        load_cache(tmp_path / "file", type(model)(config))
    with pytest.raises(WrongModel, match="model type 'llama' against 'mistral'"):
        load_cache(tmp_path / "file", built("mistral")[0])


def test_other_dtype(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    load_cache(tmp_path / "file", other)
    with pytest.raises(WrongModel, match="dtype float32 against bfloat16"):
        load_cache(tmp_path / "file", other.to(torch.bfloat16))


def test_unknown_weights_are_said_so(tmp_path: Path) -> None:
    model, _ = llama()
    cache = Cache(model.config)
    with torch.no_grad():
        model(torch.arange(4, 12).view(1, 8), past_key_values=cache)
    cache.save(tmp_path / "file")
    assert not read_summary(tmp_path / "file").has_weights_hash
    with pytest.warns(UserWarning, match=r"cache\.save\(path, model=model\)"):
        loaded = load_cache(tmp_path / "file", model)
    assert_same(loaded, cache)
    loaded.save(tmp_path / "again")  # an unknown origin does not become known by loading
    assert not read_summary(tmp_path / "again").has_weights_hash
    with pytest.raises(WrongModel, match="model type"):
        load_cache(tmp_path / "file", built("mistral")[0])
    with pytest.raises(WrongModel, match="dtype float32 against bfloat16"):
        load_cache(tmp_path / "file", type(model)(model.config).to(torch.bfloat16))


def test_text_part_of_a_multimodal_config(tmp_path: Path) -> None:
    model, _ = built("gemma3")
    cache = Cache(model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=torch.arange(4, 12).view(1, 8), past_key_values=cache)
    cache.save(tmp_path / "file")
    with pytest.warns(UserWarning, match="only the config was compared"):
        assert_same(load_cache(tmp_path / "file", model), cache)


def test_no_model(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    with pytest.raises(ModelError, match="a transformers PreTrainedModel was expected"):
        load_cache(tmp_path / "file", None)  # type: ignore[arg-type]


def test_verify_takes_three_words(tmp_path: Path) -> None:
    model, cache = llama()
    save_cache(cache, tmp_path / "file", model=model)
    with pytest.raises(FileError, match="expected 'auto', 'eager' or 'lazy'"):
        load_cache(tmp_path / "file", model, verify="no")  # type: ignore[arg-type]


# -- damage --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Any, Path]:
    """The smallest whole file: two layers' worth of a real cache."""
    model, _ = llama()
    cache = Cache(model.config)
    with torch.no_grad():
        model(torch.arange(4, 7).view(1, 3), past_key_values=cache)
    save_cache(cache, tmp_path / "whole", model=model)
    return model, tmp_path / "whole"


def refused(path: Path, data: bytes, model: Any, verify: Any = "auto") -> type[FileError]:
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        load_cache(path, model, verify=verify)
    assert str(path) in str(caught.value)
    return type(caught.value)


def test_any_flipped_bit_is_damage_and_nothing_else(
    tmp_path: Path, small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit of the first 200 bytes, and 400 others: never loaded, never another error."""
    model, path = small
    whole = path.read_bytes()
    fingerprint = load_cache.__globals__["fingerprint"](model)
    monkeypatch.setitem(load_cache.__globals__, "fingerprint", lambda _: fingerprint)
    rng = random.Random(0)
    flips = [*range(200 * 8), *(rng.randrange(len(whole) * 8) for _ in range(400))]
    for flip in flips:
        data = bytearray(whole)
        data[flip // 8] ^= 1 << flip % 8
        assert refused(tmp_path / "bad", bytes(data), model) is DamagedFile, flip


def test_truncated_anywhere(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, path = small
    whole = path.read_bytes()
    sizes = [*range(1, 64), *range(64, len(whole), 97), len(whole) - 1]
    for size in sizes:
        assert refused(tmp_path / "bad", whole[:size], model) is TruncatedFile, size


def test_lazy_damage_is_found_before_a_number_is_used(
    tmp_path: Path, small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    model, path = small
    with header.open_for_reading(path) as (_, found):
        entry, begin = found.tensors["layers.1.values"], found.data_begin
    data = bytearray(path.read_bytes())
    data[begin + entry.begin + 9] ^= 4
    path.write_bytes(data)
    loaded = load_cache(path, model)
    assert loaded.num_tokens == 3  # facts are in the header, which was checked
    loaded.layers[0].view()
    for _ in range(2):
        with pytest.raises(DamagedFile, match=r"layers\.1\.values"):
            loaded.layers[1].view()
    for verb in (
        lambda: go_on_one(model, loaded),
        lambda: loaded.fork(),
        lambda: loaded.crop(-1),
        lambda: loaded.repeat(2),
        lambda: loaded.to_state(),
        lambda: loaded.save(tmp_path / "again"),
        lambda: setattr(loaded.layers[1], "note", 1),
        lambda: Cache.merge([loaded, loaded]),
    ):
        with pytest.raises(DamagedFile, match=r"layers\.1\.values"):
            verb()
    assert not (tmp_path / "again").exists()


def go_on_one(model: Any, cache: Cache) -> None:
    with torch.no_grad():
        model(torch.tensor([[7]]), past_key_values=cache)


def test_damaged_tokens_are_found_at_once(
    tmp_path: Path, small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    model, path = small
    with header.open_for_reading(path) as (_, found):
        at = found.data_begin + found.tensors["tokens"].begin
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    assert refused(tmp_path / "bad", bytes(data), model) is DamagedFile


def test_a_lazy_layer_becomes_the_real_one(
    tmp_path: Path, small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    model, path = small
    loaded = load_cache(path, model)
    layer = loaded.layers[0]
    real = type(Cache(model.config).layers[0])
    assert type(layer) is not real
    assert isinstance(layer, real)
    assert layer.num_tokens == 3
    assert type(layer) is not real
    layer.view()
    assert type(layer) is real
    assert vars(layer).keys() == vars(Cache(model.config).layers[0]).keys()


def test_foreign_files(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, _ = small
    model.save_pretrained(tmp_path / "model")
    torch.save({"x": torch.zeros(2)}, tmp_path / "cache.pt")
    expected = {
        tmp_path / "model" / "model.safetensors": NotACacheFile,
        tmp_path / "model" / "config.json": NotACacheFile,
        tmp_path / "model": NotACacheFile,
        tmp_path / "nothing": NotACacheFile,
        tmp_path / "cache.pt": UnsafeFile,
    }
    for foreign, kind in expected.items():
        with pytest.raises(FileError) as caught:
            load_cache(foreign, model)
        assert type(caught.value) is kind, foreign
        with pytest.raises(kind):
            read_summary(foreign)


# -- forged: the digest is right, the contents lie -----------------------------------------------


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Rewrites a file with changed metadata (parsed) and tensors, signed like an honest one."""
    with safetensors.safe_open(path, "pt") as file:
        found = file.metadata()
    keys = ("mnemon_version", "recipe", "model", "cache")
    metadata: dict[str, Any] = {key: found[key] for key in keys}
    metadata |= {key: json.loads(metadata[key]) for key in ("model", "cache")}
    loaded = safetensors.torch.load_file(path)
    change(metadata, loaded)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    tensors.write_tensors(path, loaded, text)


def layer_of(metadata: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = metadata["cache"]["layers"][index]
    return found


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "unknown kind": lambda m, t: layer_of(m).update(kind="quantum"),
    "another kind": lambda m, t: layer_of(m).update(kind="window"),
    "kind is a number": lambda m, t: layer_of(m).update(kind=7),
    "a layer too few": lambda m, t: m["cache"]["layers"].pop(),
    "a layer too many": lambda m, t: m["cache"]["layers"].append(layer_of(m)),
    "layers missing": lambda m, t: m["cache"].pop("layers"),
    "layers are no list": lambda m, t: m["cache"].update(layers=7),
    "a layer is no object": lambda m, t: m["cache"]["layers"].__setitem__(0, 7),
    "no cache": lambda m, t: m.update(cache=[]),
    "cache missing": lambda m, t: m.pop("cache"),
    "meta missing": lambda m, t: m["cache"].pop("meta"),
    "layer's meta empty": lambda m, t: layer_of(m).update(meta={}),
    "layer's meta lies": lambda m, t: layer_of(m)["meta"].update(num_tokens=99),
    "layer's meta negative": lambda m, t: layer_of(m)["meta"].update(num_tokens=-1),
    "layer's meta is text": lambda m, t: layer_of(m)["meta"].update(num_tokens="many"),
    "layer's meta is a list": lambda m, t: layer_of(m).update(meta=[1]),
    "tensor listed twice": lambda m, t: layer_of(m)["tensors"].append("keys"),
    "tensor not listed": lambda m, t: layer_of(m)["tensors"].pop(),
    "tensor of another layer": lambda m, t: layer_of(m)["tensors"].append("../1.keys"),
    "tensor names are numbers": lambda m, t: layer_of(m).update(tensors=[1, 2]),
    "same as none": lambda m, t: layer_of(m).update(same={"values": "nothing"}, tensors=["values"]),
    "same is a list": lambda m, t: layer_of(m).update(same=["keys"]),
    "values are the keys": lambda m, t: layer_of(m).update(same={"values": "keys"}),
    "extra tensor": lambda m, t: t.update(extra=torch.zeros(2)),
    "parts of a plain layer": lambda m, t: layer_of(m).update(parts=7),
    "keys too short": lambda m, t: t.update({"layers.0.keys": t["layers.0.keys"][:, :, 1:]}),
    "keys of three axes": lambda m, t: t.update({"layers.0.keys": t["layers.0.keys"][0]}),
    "keys missing": lambda m, t: (t.pop("layers.0.keys"), layer_of(m)["tensors"].remove("keys")),
    "tokens missing": lambda m, t: t.pop("tokens"),
    "tokens too many": lambda m, t: t.update(tokens=torch.zeros(1, 9, dtype=torch.int32)),
    "tokens of one axis": lambda m, t: t.update(tokens=t["tokens"][0]),
    "tokens are floats": lambda m, t: t.update(tokens=t["tokens"].float()),
    "cross layers": lambda m, t: m["cache"].update(cross_layers=[layer_of(m)]),
    "prefilled is text": lambda m, t: m["cache"]["meta"].update(prefilled="yes"),
    "prefilled is wrong": lambda m, t: m["cache"]["meta"].update(prefilled={"evil": 1}),
    "no model": lambda m, t: m.pop("model"),
    "model is a list": lambda m, t: m.update(model=[]),
    "model without config": lambda m, t: m["model"].pop("config"),
    "weights are a number": lambda m, t: m["model"].update(weights=3),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_contents(small: tuple[Any, Path], name: str) -> None:
    model, path = small
    forge(path, FORGERIES[name])
    with pytest.raises(FileError) as caught:
        load_cache(path, model)
    assert type(caught.value) is DamagedFile
    assert str(path) in str(caught.value)


def test_forged_depth(small: tuple[Any, Path]) -> None:
    model, path = small

    def nest(metadata: dict[str, Any], _: Any) -> None:
        part: dict[str, Any] = {"kind": "hybrid", "meta": {}, "tensors": [], "parts": []}
        for _ in range(300):
            part = {"kind": "hybrid", "meta": {}, "tensors": [], "parts": [part]}
        metadata["cache"]["layers"][0] = part

    forge(path, nest)
    with pytest.raises(DamagedFile):
        load_cache(path, model)


@pytest.mark.parametrize("recipe", ["int3000", "static(4", "__import__('os')", "x" * 10_000])
def test_forged_recipe(small: tuple[Any, Path], recipe: str) -> None:
    model, path = small
    forge(path, lambda m, t: m.update(recipe=recipe))
    with pytest.raises(NewerVersion, match="recipe is not known here"):
        load_cache(path, model)


def test_forged_recipe_asks_for_all_memory(small: tuple[Any, Path]) -> None:
    model, path = small

    def change(metadata: dict[str, Any], _: Any) -> None:
        metadata["recipe"] = "static(4611686018427387904)"
        for layer in metadata["cache"]["layers"]:
            layer["kind"] = "static"

    forge(path, change)
    with pytest.raises(FileError):
        load_cache(path, model)


def test_an_honest_forgery_is_accepted(small: tuple[Any, Path]) -> None:
    model, path = small
    expected = load_cache(path, model)
    forge(path, lambda m, t: None)
    assert_same(load_cache(path, model), expected)


# -- saving --------------------------------------------------------------------------------------


def test_a_failing_layer_leaves_the_old_file(
    tmp_path: Path, small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small
    before = path.read_bytes()
    cache = load_cache(path, model)
    calls = 0

    def interrupt(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        yield tensor.contiguous()

    monkeypatch.setattr(tensors, "_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_cache(cache, path, model=model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["whole"]


_SAVE_FOREVER = """
import sys, torch, transformers, mnemon
config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
cache = mnemon.Cache(config)
for index in range(4):
    cache.update(torch.zeros(1, 2, 4000, 32), torch.zeros(1, 2, 4000, 32), index)
print("ready", flush=True)
while True:
    cache.save(sys.argv[1])
    print("saved", flush=True)
"""


def test_ctrl_c_while_saving(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOREVER, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a shell ignores Ctrl-C, and its children with it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while process.stdout.readline() != "saved\n":
        assert process.poll() is None
    time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert os.listdir(tmp_path) == ["file"]
    assert read_summary(path, verify=True).num_tokens == 4000


# -- looking inside ------------------------------------------------------------------------------


def test_summary(tmp_path: Path) -> None:
    model, cache = filled("t5gemma")
    save_cache(cache, tmp_path / "file", model=model)
    found = read_summary(tmp_path / "file", verify=True)
    assert found.is_verified is True
    assert (found.batch_size, found.num_tokens) == (2, cache.num_tokens)
    assert found.num_known_tokens == cache.num_known_tokens
    assert (found.recipe, found.model_type, found.dtype) == ("dense", "t5gemma", "float32")
    assert found.file_bytes == (tmp_path / "file").stat().st_size
    assert {layer.kind: layer.count for layer in found.layers} == {
        kind: sum(s.kind == kind for s in (*cache.to_state().layers, *cache.to_state().cross))
        for kind in kinds(cache.to_state())
    }
    assert sum(layer.nbytes for layer in found.layers) == cache.nbytes
    assert json.loads(json.dumps(found.to_dict()))["layers"] == list(found.to_dict()["layers"])


def test_summary_reads_no_tensor_unless_asked(small: tuple[Any, Path]) -> None:
    _, path = small
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_summary(path).is_verified is None
    with pytest.raises(DamagedFile):
        read_summary(path, verify=True)


def test_summary_needs_no_torch(small: tuple[Any, Path]) -> None:
    code = (
        "import sys; from mnemon.files import read_summary\n"
        "print(read_summary(sys.argv[1], verify=True).num_tokens, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(small[1])], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["3", "False"]


def test_checksums_are_xxh3_of_the_bytes(small: tuple[Any, Path]) -> None:
    _, path = small
    with header.open_for_reading(path) as (file, found):
        entry = found.tensors["layers.0.keys"]
        file.seek(found.data_begin + entry.begin)
        assert xxhash.xxh3_128_hexdigest(file.read(entry.nbytes)) == entry.checksum


def test_unsupported_content_is_said_before_writing(tmp_path: Path) -> None:
    model, cache = filled("llama")
    cache.content_key = float("nan")  # type: ignore[assignment]
    with pytest.raises(FileError, match="no JSON"):
        save_cache(cache, tmp_path / "file", model=model)
    assert os.listdir(tmp_path) == []
