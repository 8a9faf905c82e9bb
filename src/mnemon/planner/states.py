"""Sizes of convolution and recurrent states, family by family."""

from __future__ import annotations

from typing import NamedTuple

from mnemon.errors import PlanError
from mnemon.planner.settings import Settings


class StateValues(NamedTuple):
    """Numbers of a fixed size that one layer keeps for one sequence.

    Attributes:
        model_dtype: those in the model's dtype (convolution states).
        float32: those that transformers keeps in float32 whatever the model's dtype.
    """

    model_dtype: int
    float32: int


def state_values(s: Settings) -> StateValues:
    """The states of one linear, convolution or hybrid layer.

    Raises:
        PlanError: a model type whose states the planner does not know.
    """
    match s.model_type:
        case "mamba" | "falcon_mamba":
            inner = int(s.get("expand") * s.number("hidden_size"))
            return StateValues(inner * s.number("conv_kernel"), inner * s.number("state_size"))
        case "jamba" | "zamba":
            inner = int(s.get("mamba_expand") * s.number("hidden_size"))
            kernel, size = s.number("mamba_d_conv"), s.number("mamba_d_state")
            return StateValues(inner * kernel, inner * size)
        case "mamba2":
            inner = int(s.get("expand") * s.number("hidden_size"))
            heads = s.number("num_heads") * s.number("head_dim")
            return _mamba2(inner, heads, s, "n_groups", "state_size", "conv_kernel")
        case "zamba2":
            inner = int(s.get("mamba_expand") * s.number("hidden_size"))
            heads = s.number("n_mamba_heads")
            inner_heads = heads * (inner // heads)
            return _mamba2(inner, inner_heads, s, "mamba_ngroups", "mamba_d_state", "mamba_d_conv")
        case "bamba" | "granitemoehybrid" | "falcon_h1":
            inner = int(s.get("mamba_expand") * s.number("hidden_size"))
            if s.model_type == "falcon_h1" and s.get("mamba_d_ssm") is not None:
                inner = s.number("mamba_d_ssm")
            heads = s.number("mamba_n_heads")
            automatic = s.get("mamba_d_head") == "auto"
            head_dim = inner // heads if automatic else s.number("mamba_d_head")
            return _mamba2(
                inner, heads * head_dim, s, "mamba_n_groups", "mamba_d_state", "mamba_d_conv"
            )
        case "nemotron_h":
            inner = s.number("mamba_num_heads") * s.number("mamba_head_dim")
            groups = "mamba_n_groups" if "mamba_n_groups" in s.raw else "n_groups"
            width = "mamba_d_conv" if "mamba_d_conv" in s.raw else "conv_kernel"
            return _mamba2(inner, inner, s, groups, "ssm_state_size", width)
        case "lfm2" | "lfm2_moe" | "lfm3":
            return StateValues(s.number("hidden_size") * s.number("conv_L_cache"), 0)
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" | "olmo_hybrid":
            return _delta_net(s)
        case "kimi_linear" | "bailing_hybrid":
            return _key_gated(s)
        case "recurrent_gemma":
            return StateValues(0, 0)  # the model holds them itself, outside the cache
    raise PlanError(f"the planner does not know the states of a {s.model_type!r} model.")


def _mamba2(
    inner: int, inner_heads: int, s: Settings, groups: str, size: str, kernel: str
) -> StateValues:
    """Mamba-2: the convolution runs over x, B and C; the state is heads x head_dim x size."""
    channels = inner + 2 * s.number(groups) * s.number(size)
    return StateValues(channels * s.number(kernel), inner_heads * s.number(size))


def _delta_net(s: Settings) -> StateValues:
    """Gated delta net: a key_dim x value_dim matrix for each value head."""
    key_heads = s.first("linear_num_key_heads", "num_attention_heads")
    value_heads = s.first("linear_num_value_heads", "num_attention_heads")
    if s.get("linear_key_head_dim") is None:
        key_dim = int(0.75 * s.number("hidden_size") / key_heads)
    else:
        key_dim = s.number("linear_key_head_dim")
    unset = s.get("linear_value_head_dim") is None
    value_dim = 2 * key_dim if unset else s.number("linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return StateValues(
        channels * s.number("linear_conv_kernel_dim"), value_heads * key_dim * value_dim
    )


def _key_gated(s: Settings) -> StateValues:
    """Kimi delta attention and its kin: as many key as value heads, all of one size."""
    if s.model_type == "bailing_hybrid":
        heads, kernel = s.number("num_attention_heads"), s.number("short_conv_kernel_size")
        # head_dim is replaced by the rotary width when transformers writes the file back.
        written_back = "linear_head_dim" in s.raw
        head_dim = s.number("linear_head_dim") if written_back else s.number("head_dim")
    else:
        # Kimi's own files nest what transformers keeps flat.
        nested = s.raw.get("linear_attn_config") or {}
        renamed = {
            "num_heads": "linear_num_heads",
            "head_dim": "linear_head_dim",
            "short_conv_kernel_size": "linear_conv_kernel_dim",
        }
        flat = {new: nested[old] for old, new in renamed.items() if old in nested}
        own = Settings({**s.raw, **flat}, s.model_type)
        heads, head_dim = own.number("linear_num_heads"), own.number("linear_head_dim")
        kernel = own.number("linear_conv_kernel_dim")
    inner = heads * head_dim
    return StateValues(3 * inner * kernel, inner * head_dim)
