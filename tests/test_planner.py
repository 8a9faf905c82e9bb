"""The planner against real caches: exact to the byte, or a clear error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import planner_defaults
from tests.matrix import architectures
from tests.matrix.builders import text_inputs, tiny_config
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mnemon import Cache, attach, planner
from mnemon.errors import PlanError, RecipeError
from mnemon.planner.families import COMPOSITES, ENCODER_DECODER, MODEL_TYPES
from mnemon.planner.layer_types import NOTHING
from mnemon.recipe import parse

ROWS = architectures.rows()
#: Rows of the matrix whose caches the planner refuses to compute.
REFUSED = frozenset(
    "deepseek_v4 inkling_text minimax_m3_vl_text mllama moonshine prophetnet speech_to_text "
    "t5gemma zaya".split()
)
BATCH, LENGTH = 2, 17
#: Types that no row of the matrix has: built here.
UNSEEN = sorted(MODEL_TYPES - {row.partition("-mla")[0] for row in ROWS})
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
#: tiny configs of these need more than the table of small numbers.
EXTRA: dict[str, dict[str, Any]] = {
    "granitemoe_swa": {"layer_rope_theta": [1e4] * 4},
    "qwen3_vl_moe_text": {"head_dim": 8},
    "exaone_moe": {"layer_types": None},
    "qwen2_vl_text": {"rope_parameters": MULTIMODAL_ROPE},
    "qwen2_5_vl_text": {"rope_parameters": MULTIMODAL_ROPE},
}


def forward(model: Any, inputs: dict[str, Any], cache: Any) -> None:
    """One pass with `cache`, whatever the model calls it."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    names = inspect.signature(model.forward).parameters
    keyword = "past_key_values" if "past_key_values" in names else "cache_params"
    with torch.no_grad():
        model(**inputs, **{keyword: cache})


def saved(config: Any) -> dict[str, Any]:
    """What save_pretrained would write."""
    raw: dict[str, Any] = json.loads(config.to_json_string())
    return raw


def assert_exact(model: Any, inputs: dict[str, Any], dtype: str) -> None:
    plan = planner.plan_model(saved(model.config))
    decoder = inputs.get("decoder_input_ids")
    context = (inputs["input_ids"] if decoder is None else decoder).shape[1]
    source = None
    if decoder is not None and "input_ids" in inputs:
        source = inputs["input_ids"].shape[1]
    runs_static = model.config.model_type not in planner.NO_STATIC
    for static in (None, context + 9) if runs_static else (None,):
        cache = Cache(model.config, "" if static is None else f"static({static})")
        forward(model, inputs, cache)
        computed = planner.plan_cache(
            plan, context, BATCH, dtype=dtype, static=static, source=source
        )
        assert computed.stored_bytes == cache.nbytes
        if static is not None:
            assert computed.reserved_bytes == cache.nbytes_reserved


@pytest.mark.parametrize("name", sorted(set(ROWS) - REFUSED))
def test_matrix_rows_are_exact(name: str) -> None:
    model, make_inputs = ROWS[name].build()
    assert_exact(model.to(torch.bfloat16), make_inputs(BATCH, LENGTH), "bfloat16")


@pytest.mark.parametrize("name", sorted(set(ROWS) - REFUSED))
def test_packed_matrix_rows_are_exact(name: str) -> None:
    """Few tokens, but some of them packed."""
    text = "int4/int8(residual=0, values=token)"
    recipe = parse(text)
    model, make_inputs = ROWS[name].build()
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 99)
    length = LENGTH if (limit or 99) < 70 else 70
    model = model.to(torch.bfloat16)
    inputs = make_inputs(BATCH, length)
    try:
        cache = Cache(model.config, recipe)
    except RecipeError:
        pytest.skip("layers of a kind of their own")
    forward(model, inputs, cache)
    decoder = inputs.get("decoder_input_ids")
    plan = planner.plan_cache(
        planner.plan_model(saved(model.config)),
        (inputs["input_ids"] if decoder is None else decoder).shape[1],
        BATCH,
        packed=recipe.packed,
        source=inputs["input_ids"].shape[1]
        if decoder is not None and "input_ids" in inputs
        else None,
    )
    assert plan.recipe == "int4/int8"
    assert plan.stored_bytes == plan.reserved_bytes == cache.nbytes


@pytest.mark.parametrize("name", ["llama", "mamba2", "gemma3_text", "t5", "deepseek_v3"])
def test_float32_is_exact(name: str) -> None:
    model, make_inputs = ROWS[name].build()
    assert_exact(model, make_inputs(BATCH, LENGTH), "float32")


@pytest.mark.parametrize("name", sorted(REFUSED & set(ROWS)))
def test_what_it_does_not_know_is_an_error_that_names_it(name: str) -> None:
    model, _ = ROWS[name].build()
    with pytest.raises(PlanError, match=f"model type {model.config.model_type!r}"):
        planner.plan_model(saved(model.config))


@pytest.mark.parametrize("name", UNSEEN)
def test_other_known_types_are_exact(name: str) -> None:
    """Types the matrix has no row for: the bare decoder, tiny."""
    config = tiny_config(name, **EXTRA.get(name, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    model = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    inputs = text_inputs(BATCH, LENGTH)
    assert_exact(model, inputs, "bfloat16")


def test_defaults_file_is_what_transformers_has() -> None:
    written = json.loads(planner_defaults.PATH.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(planner_defaults.table()))


@pytest.mark.parametrize("name", sorted(MODEL_TYPES - ENCODER_DECODER))
def test_a_bare_config_means_what_transformers_reads_into_it(name: str) -> None:
    """A config.json with nothing but its type: every default, every pattern of layers."""
    raw = {"model_type": name}
    if name == "trocr":
        pytest.skip("transformers counts the encoder's layers of a bare TrOCR config")
    config = CONFIG_MAPPING[name].from_dict(dict(raw))
    expected, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    plan = planner.plan_model(raw)
    kinds = [NOTHING if kind == "dummy" else kind for kind in expected]
    assert [layer.kind for layer in plan.layers] == kinds
    windows = [option.get("sliding_window") for option in options]
    assert [layer.window for layer in plan.layers] == windows


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, 4),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}, 0),
        ({"model_type": "mistral", "sliding_window": 64}, 32),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window_pattern": 3}, 8),
        ({"model_type": "gpt2", "n_layer": 3}, 0),
        ({"model_type": "gpt2", "num_hidden_layers": 5}, 0),
        ({"model_type": "cohere2", "num_hidden_layers": 8, "sliding_window_pattern": 2}, 4),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*E*"}, 0),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 31 + ["attention"]}, 0),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 18}, None),
        ({"model_type": "exaone4", "sliding_window": 128, "sliding_window_pattern": 2}, 16),
        ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 64}, 9),
        ({"model_type": "llama4_text", "no_rope_layer_interval": 2, "num_hidden_layers": 6}, 3),
    ],
)
def test_layers_agree_with_transformers_for_what_files_say(
    raw: dict[str, Any], windows: int | None
) -> None:
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    expected, options = get_layer_types_and_kwargs(config)
    plan = planner.plan_model(raw)
    assert [layer.kind for layer in plan.layers] == [
        NOTHING if kind == "dummy" else kind for kind in expected
    ]
    assert [layer.window for layer in plan.layers] == [o.get("sliding_window") for o in options]
    if windows is not None:
        assert sum(layer.window is not None for layer in plan.layers) == windows


@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_the_text_section_of_multimodal_configs_is_found(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    text = config.get_text_config(decoder=True)
    raw = saved(config)
    plan = planner.plan_model(raw)
    assert plan.model_type == text.model_type
    assert len(plan.layers) == text.num_hidden_layers
    key, _ = COMPOSITES[name]
    del raw[key]
    with pytest.raises(PlanError, match=key):
        planner.plan_model(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "model_type"),
        ({"model_type": "nobody-knows"}, "nobody-knows"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"model_type": "llama", "num_hidden_layers": True}, "num_hidden_layers"),
        ({"model_type": "llama", "layer_types": ["new_attention"] * 32}, "new_attention"),
        ({"model_type": "llama", "layer_types": 7}, "layer_types"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"]}, "window"),
        ({"model_type": "kimi_linear", "layer_types": ["conv"], "linear_head_dim": None}, "linear"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 99}, "num_kv_shared_layers"),
    ],
)
def test_bad_configs_are_plan_errors(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        planner.plan_model(raw)


def llama(**fields: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 4, **fields}


def test_lengths_and_dtypes_that_cannot_be() -> None:
    plan = planner.plan_model(llama())
    with pytest.raises(PlanError, match="at least 1"):
        planner.plan_cache(plan, 0)
    with pytest.raises(PlanError, match="at least 1"):
        planner.plan_cache(plan, 1, 0)
    with pytest.raises(PlanError, match="int7"):
        planner.plan_cache(plan, 1, dtype="int7")
    with pytest.raises(PlanError, match="static\\(8\\) holds 8"):
        planner.plan_cache(plan, 9, static=8)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("raw", [llama(), {"model_type": "gemma3_text"}, {"model_type": "jamba"}])
def test_the_longest_context_fits_and_one_more_does_not(raw: dict[str, Any], static: bool) -> None:
    plan = planner.plan_model(raw)
    budget = 3 * 2**30
    longest = planner.max_context(plan, budget, 2, dtype="bfloat16", static=static)
    assert longest

    def reserved(tokens: int) -> int:
        slots = tokens if static else None
        return planner.plan_cache(plan, tokens, 2, static=slots).reserved_bytes

    assert reserved(longest) <= budget < reserved(longest + 1)


def test_no_length_is_too_long_for_states_and_none_fits_in_nothing() -> None:
    plan = planner.plan_model({"model_type": "mamba"})
    assert planner.max_context(plan, 2**30, dtype="float32") is None
    assert planner.max_context(plan, 10, dtype="float32") == 0


def test_batches_that_fit() -> None:
    plan = planner.plan_model(llama())
    row = planner.plan_cache(plan, 1000)
    rows = planner.max_batch(row, 10**9)
    assert rows
    assert planner.plan_cache(plan, 1000, rows).reserved_bytes <= 10**9
    assert planner.plan_cache(plan, 1000, rows + 1).reserved_bytes > 10**9
    assert planner.max_batch(row, -5) == 0


def small_llama(folder: Path, **fields: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        **fields,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=fields.get("shard", "5GB"))
    return model


def stored_bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_from_headers_and_from_the_config(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tmp_path, tie_word_embeddings=tied, attention_bias=tied, mlp_bias=tied)
    raw = json.loads((tmp_path / "config.json").read_text())
    plan = planner.plan_model(raw)
    dtype = planner.model_dtype(raw, tmp_path)
    assert dtype == "bfloat16"
    options = {"dtype": dtype, "as_saved": True}
    assert planner.weight_bytes(raw, plan, tmp_path, **options) == stored_bytes(model)
    doubled = {"dtype": "float32", "as_saved": False}
    assert planner.weight_bytes(raw, plan, tmp_path, **doubled) == 2 * stored_bytes(model)
    assert planner.weight_bytes(raw, plan, None, **options) == stored_bytes(model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_parameters_counted_from_the_config(kind: str) -> None:
    config = tiny_config(kind)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    raw = saved(config)
    plan = planner.plan_model(raw)
    counted = planner.weight_bytes(raw, plan, None, dtype="bfloat16", as_saved=True)
    assert counted == stored_bytes(model)


def test_shards_are_added_and_a_missing_one_is_not_ignored(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=999,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    raw = json.loads((tmp_path / "config.json").read_text())
    plan = planner.plan_model(raw)
    options = {"dtype": "float32", "as_saved": True}
    assert planner.weight_bytes(raw, plan, tmp_path, **options) == stored_bytes(model)
    # Half the files are not half the model: the config's own count is used instead.
    shards[0].unlink()
    assert planner.weight_bytes(raw, plan, tmp_path, **options) == stored_bytes(model)
    raw["model_type"] = "olmo"
    plan = planner.plan_model(raw)
    assert planner.weight_bytes(raw, plan, tmp_path, **options) is None


def test_the_dtype_is_read_from_the_files_when_the_config_has_none(tmp_path: Path) -> None:
    small_llama(tmp_path)
    assert planner.model_dtype({"model_type": "llama"}, tmp_path) == "bfloat16"
    assert planner.model_dtype({"model_type": "llama"}, None) == "float32"
    assert planner.model_dtype({"torch_dtype": "float16"}, None) == "float16"
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_planner_imports_no_torch() -> None:
    code = (
        "import sys, mnemon.planner; "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plans_are_plain_values() -> None:
    assert dataclasses.is_dataclass(planner.CachePlan) is False
    plan = planner.plan_cache(planner.plan_model(llama()), 5)
    assert json.loads(json.dumps(plan._asdict()))["recipe"] == "dense"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1", "gpt2", "bart"])
@pytest.mark.parametrize(
    "text",
    ["window(7, every=2)", "sinks(2) + window(0.4)", "h2o(keep=9)", "random(keep=9) + int4",
     "tova(keep=0.99) + int4(residual=0)", "h2o(keep=66) + int8(residual=0)"],
)  # fmt: skip
def test_policies_are_exact(name: str, text: str) -> None:
    model, make_inputs = ROWS[name].build()
    model, recipe = model.to(torch.bfloat16), parse(text)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 99)
    length = LENGTH if (limit or 99) < 70 else 70
    inputs = make_inputs(BATCH, length)
    cache = Cache(model.config, recipe)
    with attach(model):
        forward(model, inputs, cache)
    decoder = inputs.get("decoder_input_ids")
    seen = (inputs["input_ids"] if decoder is None else decoder).shape[1]
    plan = planner.plan_cache(
        planner.plan_model(saved(model.config)),
        seen,
        BATCH,
        packed=recipe.packed,
        bound=recipe.bound,
        source=inputs["input_ids"].shape[1] if decoder is not None else None,
    )
    assert cache.num_tokens == seen
    assert plan.stored_bytes == cache.nbytes
    assert plan.reserved_bytes >= plan.stored_bytes
    assert plan.token_bytes >= 0
