"""What kind each layer is: the config's own list, or the pattern its model type has."""

from __future__ import annotations

from mnemon.errors import PlanError
from mnemon.planner.settings import Settings

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, CONV, HYBRID, INDEXED = "linear_attention", "conv", "hybrid", "indexed_attention"
NOTHING = "nothing"

# Names that older files use.
_RENAMED = {
    "mamba": LINEAR,
    "attention": FULL,
    "deepseek_sparse_attention": INDEXED,
    "moe": NOTHING,
    "mlp": NOTHING,
}
_KNOWN = {FULL, SLIDING, CHUNKED, LINEAR, CONV, HYBRID, INDEXED, NOTHING}

# Sliding layers with a full one at every n-th: by model type, (field or None, n if unset).
_EVERY = {
    "afmoe": ("global_attn_every_n_layers", 4),
    "beam": (None, 6),
    "cohere2": ("sliding_window_pattern", 4),
    "exaone4": ("sliding_window_pattern", 4),
    "exaone_moe": ("sliding_window_pattern", 4),
    "gemma2": (None, 2),
    "gemma3_text": ("sliding_window_pattern", 6),
    "gemma3n_text": (None, 5),
    "gemma4_text": (None, 6),
    "gemma4_unified_text": (None, 6),
    "gpt_oss": (None, 2),
    "kolibri1": (None, 5),
    "olmo3": (None, 4),
    "vaultgemma": (None, 2),
}
_LAST_IS_FULL = ("beam", "gemma4_text", "gemma4_unified_text")
_UPPER_LAYERS_SLIDE = ("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text")
_SWITCHED_WINDOW = (*_UPPER_LAYERS_SLIDE, "qwen3_moe")  # a window only with use_sliding_window


def layer_types(s: Settings) -> list[str]:
    """The kind of every layer, in order.

    Raises:
        PlanError: an unknown layer type, or lists of unequal length.
    """
    types = [_RENAMED.get(name, name) for name in _listed(s) or _pattern(s, _num_layers(s))]
    if s.model_type in ("gemma4_text", "gemma4_unified_text") and types:
        types[-1] = FULL
    unknown = sorted(set(types) - _KNOWN)
    if unknown:
        raise PlanError(
            f"config.json of a {s.model_type!r} model names layer type {unknown[0]!r}, "
            f"which the planner does not know; it knows {', '.join(sorted(_KNOWN))}."
        )
    shared = s.number("num_kv_shared_layers") if s.get("num_kv_shared_layers") else 0
    if shared >= len(types) and shared:
        raise PlanError(
            f"num_kv_shared_layers = {shared} of {len(types)} layers; it must be fewer."
        )
    return types[: len(types) - shared] + [NOTHING] * shared


def window(s: Settings) -> int | None:
    """Tokens that a sliding layer's query sees, itself included."""
    name = "attention_chunk_size" if s.model_type == "llama4_text" else "sliding_window"
    if s.model_type == "modernbert-decoder":
        return s.number("local_attention") // 2
    if s.model_type == "mimo_v2_flash" and s.raw.get("sliding_window_size") is not None:
        return s.number("sliding_window_size") + 1
    if s.model_type in _SWITCHED_WINDOW and not s.get("use_sliding_window"):
        return None
    if s.get(name) is None:
        return None
    size = s.number(name)
    bidirectional = s.get("use_bidirectional_attention")
    if bidirectional == "all" or (s.model_type == "gemma3_text" and bidirectional):
        return size // 2 + 1
    return size


def _num_layers(s: Settings) -> int:
    if s.model_type == "nemotron_h":
        return 0  # as many as its list has
    if s.model_type in ("t5", "mt5", "umt5", "longt5", "switch_transformers"):
        return s.first("num_decoder_layers", "num_layers")
    if s.get("is_encoder_decoder") and s.get("decoder_layers") is not None:
        return s.number("decoder_layers")
    if s.model_type == "trocr":
        return s.number("decoder_layers")
    if s.model_type == "longcat_flash":  # two attention blocks in each layer, each with a cache
        return 2 * s.number("num_layers")
    if s.model_type == "hrm_text":
        stack = s.first("num_layers_per_stack", "num_hidden_layers")
        return stack * s.number("H_cycles") * (s.number("L_cycles") + 1)
    return s.number("num_hidden_layers")


def _listed(s: Settings) -> list[str] | None:
    """The list in the file, under the name its model type uses."""
    if s.model_type == "recurrent_gemma":
        cycle = s.names("block_types") or []
        names = (cycle * s.number("num_hidden_layers"))[: s.number("num_hidden_layers")]
        return [LINEAR if name == "recurrent" else SLIDING for name in names]
    if s.model_type in ("jamba", "bamba", "falcon_h1", "mamba", "mamba2", "falcon_mamba"):
        return None  # derived there, whatever the file lists
    if s.model_type == "nemotron_h" and isinstance(s.raw.get("hybrid_override_pattern"), str):
        letters = {"M": LINEAR, "*": FULL, "E": NOTHING, "-": NOTHING}
        pattern = s.raw["hybrid_override_pattern"]
        if s.names("layers_block_type") is None:
            return [letters.get(letter, letter) for letter in pattern]
    return s.names("layer_types")


def _pattern(s: Settings, n: int) -> list[str]:
    """The kinds that `s.model_type` has when the file lists none."""
    name = s.model_type
    if name in _EVERY:
        field, unset = _EVERY[name]
        period = s.number(field) if field and s.get(field) is not None else unset
        if name.startswith("exaone") and s.get("sliding_window") is None:
            raise PlanError(f"a {name!r} config without a window must list its layer_types.")
        types = [SLIDING if (i + 1) % period else FULL for i in range(n)]
        return [*types[:-1], FULL] if name in _LAST_IS_FULL and types else types
    if name in _UPPER_LAYERS_SLIDE or name == "dots1":
        above = s.number("max_window_layers") if window(s) is not None else n
        return [SLIDING if i >= above else FULL for i in range(n)]
    match name:
        case "qwen2_moe":
            sliding = bool(s.get("use_sliding_window"))
            above = s.number("max_window_layers")
            return [SLIDING if (i + 1) % 2 and i < above and sliding else FULL for i in range(n)]
        case "cwm" | "granite_swa" | "granitemoe_swa":
            return [SLIDING if i % 4 else FULL for i in range(n)]
        case "cohere2_moe":
            dense = int(s.raw.get("first_k_dense_replace") or 0)
            first, rest = (
                s.number("prefix_dense_sliding_window_pattern"),
                s.number("sliding_window_pattern"),
            )
            periods = [(i, first) for i in range(dense)] + [(i, rest) for i in range(n - dense)]
            return [SLIDING if (i + 1) % period else FULL for i, period in periods]
        case "flint":
            full = {0, 1, n - 1}
            return [FULL if i in full or i % 4 == 1 else SLIDING for i in range(n)]
        case "mimo_v2_flash":
            return [FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(n)]
        case "modernbert-decoder":
            period = int(s.raw.get("global_attn_every_n_layers") or 3)
            return [SLIDING if i % period else FULL for i in range(n)]
        case "smollm3" | "llama4_text":
            return _no_rope(s, n)
        case "gpt_neo" | "laguna" | "mellum":
            return [FULL] * n
    return _stateful_pattern(s, n)


def _no_rope(s: Settings, n: int) -> list[str]:
    """Layers without rotary positions: full in Llama 4, sliding in SmolLM 3."""
    interval = s.number("no_rope_layer_interval")
    rope = s.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    if s.model_type == "llama4_text":
        return [CHUNKED if rotary else FULL for rotary in rope]
    slides = bool(s.get("use_sliding_window")) and window(s) is not None
    return [SLIDING if slides and not rotary else FULL for rotary in rope]


def _stateful_pattern(s: Settings, n: int) -> list[str]:
    match s.model_type:
        case "mamba" | "mamba2" | "falcon_mamba" | "granitemoehybrid":
            return [LINEAR] * n
        case "falcon_h1":
            return [HYBRID] * n
        case "jamba":
            period, offset = s.number("attn_layer_period"), s.number("attn_layer_offset")
            return [FULL if i % period == offset else LINEAR for i in range(n)]
        case "bamba":
            full = s.get("attn_layer_indices") or []
            return [FULL if i in full else LINEAR for i in range(n)]
        case "zamba":
            period, offset = s.number("attn_layer_period"), s.number("attn_layer_offset")
            rest = [HYBRID if i % period == offset else LINEAR for i in range(n - 3)]
            return [LINEAR, LINEAR, HYBRID, *rest]
        case "zamba2":
            six = [LINEAR] * 5 + [HYBRID]
            tail = [LINEAR] * 4 + [HYBRID] + [LINEAR] * 3 + [HYBRID] + [LINEAR] * 2
            return [LINEAR, *(six * 7), *tail]
        case "nemotron_h":
            return [LINEAR, NOTHING, FULL, NOTHING]
        case "lfm2":
            full = s.get("full_attn_idxs")
            return [FULL if full is None or i in full else CONV for i in range(n)]
        case "lfm3":
            return [FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i else CONV for i in range(n)]
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
            interval = int(s.raw.get("full_attention_interval") or 4)
            return [LINEAR if (i + 1) % interval else FULL for i in range(n)]
        case "olmo_hybrid":
            types = [FULL if i % 4 == 3 else LINEAR for i in range(n)]
            return types if FULL in types else [*types[:-1], FULL]
        case "bailing_hybrid":
            group = s.number("layer_group_size")
            return [LINEAR if (i + 1) % group else FULL for i in range(n)]
        case "deepseek_v32" | "glm_moe_dsa":
            return [INDEXED] * n
        case "kimi_linear":
            return _kimi(s, n)
    # transformers' own rule for a config without a list.
    if window(s) is not None:
        return [SLIDING] * n
    return [FULL] * n


def _kimi(s: Settings, n: int) -> list[str]:
    linear = s.raw.get("linear_attn_config") or {}
    if "full_attn_layers" in linear and "kda_layers" in linear:
        full = set(linear["full_attn_layers"])  # counted from 1 in the file
        return [FULL if i + 1 in full else LINEAR for i in range(n)]
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(n)]
