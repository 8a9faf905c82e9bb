"""The rows of the matrix: tiny random models of the architectures that transformers 5.23 has.

Excluded because they do not read transformers' common cache at all (there is nothing to replace):
xlnet and rwkv (their own states), xlstm (`xLSTMCache`), reformer (bucket cache), minimax (the
first one, `MiniMaxCache`), openai-gpt (no cache) and xlm (no cache). prophetnet is left out because
it takes one token at a time with a cache: prompts, turns and drafts all raise.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mnemon.hf.versions import installed
from mnemon.hf.versions.supported import release

from .builders import (
    BOS,
    IMAGE_TOKEN,
    MLA,
    PAD,
    VOCABULARY,
    WINDOW,
    Architecture,
    MakeInputs,
    class_for,
    finish,
    image_inputs,
    sequence_inputs,
    speech_inputs,
    text_inputs,
    tiny_config,
    waveform_inputs,
)

#: Configs of transformers 4 spell some fields otherwise.
RELEASE = release(installed)
IS_OLD = RELEASE < (5, 0)
FULL, SLIDING, CHUNKED, LINEAR = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)
_ROWS: dict[str, Architecture] = {}


def _add(
    name: str, family: str, build: Any, fast: bool = False, model_type: str | None = None
) -> None:
    assert name not in _ROWS, name
    _ROWS[name] = Architecture(
        name=name, family=family, build=build, fast=fast, model_type=model_type or name
    )


def _text(
    model_type: str,
    family: str,
    *,
    name: str | None = None,
    fast: bool = False,
    head: str | None = None,
    **fields: Any,
) -> None:
    """A row of a text model; encoder-decoders get encoder inputs."""

    if family in ("window", "hybrid", "shared", "compressed"):  # room for a pattern of layers
        fields = {"num_hidden_layers": 4, **fields}

    def build() -> tuple[Any, MakeInputs]:
        config = tiny_config(model_type, **fields)
        make_inputs = sequence_inputs if config.is_encoder_decoder else text_inputs
        return finish(class_for(model_type, head)(config), make_inputs)

    _add(name or model_type, family, build, fast, model_type)


# --- decoders that keep every key and value --------------------------------------------------
_text("llama", "decoder", fast=True)
for _name in (
    *("arcee", "apertus", "biogpt", "bitnet", "bloom", "cohere", "diffllama", "ernie4_5"),
    *("falcon", "gemma", "glm", "glm4", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "granite"),
    *("helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "nanochat", "nemotron"),
    *("olmo", "olmo2", "opt", "persimmon", "phi", "qwen2", "qwen3", "seed_oss", "smollm3"),
    *("stablelm", "trocr", "xglm"),
):
    _text(_name, "decoder", fast=_name in ("bloom",))
_text("gpt2", "decoder", fast=True)
_text("mpt", "decoder", use_cache=True)
# moshi's mask knows no window and its cache does: with a small window, transformers' own tokens
# depend on how the prompt was cut.
_text("moshi", "decoder", sliding_window=256)
_text("ctrl", "decoder", dff=48)
_text("codegen", "decoder", rotary_dim=4)
_text("gptj", "decoder", rotary_dim=4)
_text("roberta", "decoder", is_decoder=True)

# --- mixtures of experts ---------------------------------------------------------------------
_text("mixtral", "moe", fast=True)
# In 4.57 it is as with moshi: its mask knows no window.
_text("phimoe", "moe", sliding_window=256 if IS_OLD else WINDOW)
for _name in (
    *("cohere2_moe", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe"),
    *("granitemoeshared", "hunyuan_v1_moe", "jetmoe", "minimax_m2", "olmoe"),
    *("qwen2_moe", "qwen3_moe", "solar_open"),
):
    _text(_name, "moe")
_text(
    "dbrx",
    "moe",
    attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    ffn_config={
        # One of two fields that the router confuses before 5.19.
        "ffn_hidden_size": 48 if RELEASE >= (5, 19) else 32,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "ffn_act_fn": {"name": "silu"},
    }
    | ({} if IS_OLD else {"hidden_size": 32}),
    intermediate_size=48,
)

# --- sliding windows and chunks --------------------------------------------------------------
_text("mistral", "window", fast=True)
_text("gemma3_text", "window", fast=True, layer_types=[SLIDING, SLIDING, FULL, SLIDING])
_text("gpt_oss", "window", layer_types=[SLIDING, FULL, SLIDING, FULL])
_text("llama4_text", "window", fast=True, layer_types=[CHUNKED, CHUNKED, FULL, CHUNKED])
for _name in (
    *("afmoe", "cohere2", "cwm", "exaone4", "gemma2", "granite_swa", "laguna", "mellum"),
    *("mimo_v2_flash", "ministral", "modernbert-decoder", "olmo3", "phi3", "starcoder2"),
    "vaultgemma",
):
    _text(_name, "window")
_text("gpt_neo", "window", attention_types=[[["global", "local"], 2]], num_layers=4, window_size=12)

# --- states that do not grow, alone and beside attention --------------------------------------
_text("mamba", "mamba", fast=True)
_text("mamba2", "mamba", num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
_text("falcon_mamba", "mamba")
_text("jamba", "hybrid", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, fast=True)
_text("bamba", "hybrid", attn_layer_indices=[1, 3])
_text("falcon_h1", "hybrid", mamba_d_ssm=64)
_text(
    "granitemoehybrid",
    "hybrid",
    layer_types=["mamba", "attention", "mamba", "attention"],
    shared_intermediate_size=16,
)
_text(
    "zamba",
    "hybrid",
    num_key_value_heads=4,
    layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
    mamba_dt_rank=4,
    **({} if RELEASE >= (5, 19) else {"use_mamba_kernels": False}),
)
_text(
    "zamba2",
    "hybrid",
    num_key_value_heads=4,
    layers_block_type=[LINEAR, "hybrid", LINEAR, "hybrid"],
    mamba_ngroups=1,
    n_mamba_heads=4,
    mamba_headdim=16,
    chunk_size=8,
    adapter_rank=8,
)
_text(
    "nemotron_h",
    "hybrid",
    # 5.14's own cache knows no "mlp".
    layers_block_type=[LINEAR, "moe", FULL, LINEAR, *(["mlp"] if RELEASE >= (5, 19) else []), FULL],
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    **{"chunk_size": 8, "moe_shared_expert_intermediate_size": 16},
)
_text("lfm2", "hybrid", layer_types=["conv", FULL, "conv", FULL])
_text("lfm2_moe", "hybrid", layer_types=["conv", FULL, "conv", FULL])
_text("lfm3", "hybrid")
_text("recurrent_gemma", "hybrid", attention_window_size=WINDOW, num_hidden_layers=3)
_text("qwen3_next", "hybrid", layer_types=[LINEAR, FULL, LINEAR, FULL], fast=True)
_text("qwen3_5_text", "hybrid", layer_types=[LINEAR, FULL, LINEAR, FULL])
_text("qwen3_5_moe_text", "hybrid", layer_types=[LINEAR, FULL, LINEAR, FULL])
_text("olmo_hybrid", "hybrid", layer_types=[LINEAR, FULL, LINEAR, FULL])
_LINEAR_MLA = {**MLA, "layer_types": [LINEAR, FULL, LINEAR, FULL]}
_text("kimi_linear", "hybrid", **_LINEAR_MLA, linear_head_dim=8, linear_num_heads=4)
_text("bailing_hybrid", "hybrid", **{**_LINEAR_MLA, "head_dim": 8})
_text("zaya", "hybrid", num_experts_per_tok=1, router_hidden_size=16)
_text(
    "inkling_text",
    "hybrid",
    layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    **{"sliding_window_size": WINDOW, "rel_extent": 64, "d_rel": 4},
)

# --- multi-head latent attention, indexed and compressed layers -------------------------------
_text("deepseek_v2", "mla", fast=True, **MLA)
for _name in ("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"):
    _text(_name, "mla", **MLA)
_text(
    "longcat_flash",
    "mla",
    **{**MLA, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
    **{"moe_topk": 2, "zero_expert_num": 2},
)
_INDEXED = {**MLA, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}
_text("deepseek_v32", "indexed", **_INDEXED)
_text("glm_moe_dsa", "indexed", **_INDEXED)
_COMPRESSED, _HEAVILY = "compressed_sparse_attention", "heavily_compressed_attention"
_text(
    "deepseek_v4",
    "compressed",
    num_key_value_heads=1,
    layer_types=[_HEAVILY, _COMPRESSED, SLIDING, _COMPRESSED],
    compress_rates={_COMPRESSED: 4, _HEAVILY: 8},
    mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    **{"o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 2},
)
_text(
    "minimax_m3_vl_text",
    "compressed",
    layer_types=[FULL, "minimax_m3_sparse", FULL, "minimax_m3_sparse"],
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    **{"dense_intermediate_size": 48, "shared_intermediate_size": 16, "rotary_dim": 4},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2},
)

# --- layers that read another layer's keys ----------------------------------------------------
_SHARED = {
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_text("gemma3n_text", "shared", **_SHARED, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4)
_text("gemma4_text", "shared", **_SHARED, fast=True, global_head_dim=8)
_text("gemma4_unified_text", "shared", **_SHARED)
_text("hrm_text", "decoder")

# --- encoder-decoders -------------------------------------------------------------------------
_text("bart", "encoder-decoder", fast=True)
_text("t5", "encoder-decoder", fast=True, num_decoder_layers=2)
for _name in (
    *("mbart", "marian", "pegasus", "pegasus_x", "blenderbot", "blenderbot-small", "m2m_100"),
    *("nllb-moe", "led", "plbart", "mvp"),
    *("mt5", "umt5", "longt5", "switch_transformers"),
):
    _text(_name, "encoder-decoder")
# Short inputs switch it to full attention in its first forward: new layers, which take from the
# random numbers that sampling would have had.
_text("bigbird_pegasus", "encoder-decoder", attention_type="original_full")


def _t5gemma() -> tuple[Any, MakeInputs]:
    """A Gemma 2 on each side, nested: sizes are given per side."""
    half = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
        **{"sliding_window": WINDOW, "max_position_embeddings": 256, "query_pre_attn_scalar": 8},
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None},
    }
    config = CONFIG_MAPPING["t5gemma"](
        encoder=dict(half), decoder=dict(half), vocab_size=VOCABULARY, eos_token_id=None
    )
    model = class_for("t5gemma", "T5GemmaForConditionalGeneration")(config)
    # Multiplied by sqrt(hidden_size) in the model, like all Gemmas' embeddings.
    return finish(model, sequence_inputs, embedding_std=0.3)


_add("t5gemma", "encoder-decoder", _t5gemma)


# --- speech -----------------------------------------------------------------------------------
def _speech(model_type: str, head: str, make_inputs: MakeInputs, **fields: Any) -> None:
    def build() -> tuple[Any, MakeInputs]:
        config = tiny_config(model_type, decoder_start_token_id=BOS, **fields)
        return finish(class_for(model_type, head)(config), make_inputs)

    _add(model_type, "speech", build, fast=model_type == "whisper")


_speech(
    "whisper",
    "WhisperForConditionalGeneration",
    speech_inputs(16, 40, features_first=True, with_mask=False),
    num_mel_bins=16,
    max_source_positions=20,
    max_target_positions=256,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
_speech(
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    speech_inputs(16, 40, features_first=False, with_mask=True),
    input_feat_per_channel=16,
    conv_channels=32,
    max_source_positions=64,
    max_target_positions=256,
)
_speech(
    "moonshine",
    "MoonshineForConditionalGeneration",
    waveform_inputs(2000),
    encoder_num_hidden_layers=1,
    decoder_num_hidden_layers=2,
    **({"num_key_value_heads": 4} if IS_OLD else {}),
    encoder_num_attention_heads=4,
    decoder_num_attention_heads=4,
)


def _rope(**more: Any) -> dict[str, Any]:
    """Plain rotary positions, under the name that configs of this release use."""
    if not IS_OLD:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}
    return {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", **more}}


# --- images and text --------------------------------------------------------------------------
def _image_text(
    model_type: str,
    head: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    make_inputs: MakeInputs,
    **fields: Any,
) -> None:
    """A row of a model with a vision tower; `text` and `vision` are fields of the two configs."""

    def build() -> tuple[Any, MakeInputs]:
        text_fields = {name: value for name, value in text.items() if name != "model_type"}
        text_config: Any = tiny_config(text["model_type"], **text_fields)
        if IS_OLD:  # some older configs take dicts only
            text_config = text_config.to_dict()
        config = CONFIG_MAPPING[model_type](text_config=text_config, vision_config=vision, **fields)
        return finish(class_for(model_type, head)(config), make_inputs)

    _add(model_type, "multimodal", build)


_TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "image_size": 16, "patch_size": 8},
}
_image_text(
    "llava",
    "LlavaForConditionalGeneration",
    {"model_type": "llama"},
    {"model_type": "clip_vision_model", **_TOWER},
    image_inputs(4, 16),
    image_token_index=IMAGE_TOKEN,
    vision_feature_layer=-1,
)
_image_text(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    },
    {"model_type": "siglip_vision_model", **_TOWER},
    image_inputs(4, 16),
    image_token_index=IMAGE_TOKEN,
    mm_tokens_per_image=4,
)
_image_text(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    {"model_type": "gemma"},
    {"model_type": "siglip_vision_model", **_TOWER, "projection_dim": 32},
    image_inputs(4, 16),
    image_token_index=IMAGE_TOKEN,
    projection_dim=32,
)
_image_text(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    {
        "model_type": "qwen2_vl_text",
        **_rope(mrope_section=[1, 1, 2]),
    },
    {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    text_inputs,
)
_image_text(
    "mllama",
    "MllamaForConditionalGeneration",
    {
        "model_type": "mllama_text_model",
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        **_rope(),
    },
    {
        **_TOWER,
        "attention_heads": 4,
        "num_global_layers": 1,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    },
    text_inputs,
)


def rows() -> dict[str, Architecture]:
    """The rows that the installed transformers has, by name, in the order of the table."""
    return {name: row for name, row in _ROWS.items() if row.model_type in CONFIG_MAPPING}


def missing() -> list[str]:
    """Names of the rows that it does not have."""
    return [name for name in _ROWS if name not in rows()]
