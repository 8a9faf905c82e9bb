"""One config.json as transformers would read it: other names, defaults and nesting resolved."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mnemon.errors import PlanError

# The fields that the planner reads; `tests/planner_defaults.py` writes their defaults to
# defaults.json from transformers' own config classes.
FIELDS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"),
    *("layer_types", "layers_block_type", "sliding_window", "attention_chunk_size"),
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern", "no_rope_layers"),
    *(
        "no_rope_layer_interval",
        "global_attn_every_n_layers",
        "prefix_dense_sliding_window_pattern",
    ),
    *("local_attention", "attention_types", "window_size", "attention_window_size", "block_types"),
    *("kv_lora_rank", "qk_rope_head_dim", "index_head_dim", "indexer_types"),
    *("num_kv_heads", "multi_query", "new_decoder_architecture", "kv_channels", "v_head_dim"),
    *("swa_num_key_value_heads", "swa_num_attention_heads", "swa_head_dim", "swa_v_head_dim"),
    *("num_kv_shared_layers", "attention_k_eq_v", "use_bidirectional_attention"),
    *("H_cycles", "L_cycles", "num_layers_per_stack", "layer_group_size", "attention_head_dim"),
    *("attn_layer_period", "attn_layer_offset", "attn_layer_indices", "full_attn_idxs"),
    *("expand", "state_size", "conv_kernel", "num_heads", "n_groups", "intermediate_size"),
    *("mamba_expand", "mamba_d_state", "mamba_d_conv", "mamba_n_heads", "mamba_d_head"),
    *("mamba_n_groups", "mamba_d_ssm", "n_mamba_heads", "mamba_ngroups", "mamba_num_heads"),
    *("mamba_head_dim", "ssm_state_size", "conv_L_cache"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim", "linear_head_dim", "linear_num_heads"),
    *("short_conv_kernel_size", "d_model", "d_kv", "num_layers", "num_decoder_layers"),
    *("decoder_layers", "decoder_attention_heads", "max_source_positions", "is_encoder_decoder"),
    *("max_position_embeddings", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
)


@cache
def _table() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("defaults.json")
    table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return table


class Settings:
    """Values of one (text) config by transformers' common names.

    Args:
        raw: the config.json, or the section of it that describes the text decoder.
        model_type: its model type.

    Raises:
        PlanError: a model type that the planner does not know.
    """

    def __init__(self, raw: dict[str, Any], model_type: str) -> None:
        known = _table().get(model_type)
        if known is None:
            raise PlanError(
                f"the planner does not know model type {model_type!r}, and it does not guess; "
                "load the model and read cache.nbytes instead (`mnemon bench` does)."
            )
        self.model_type = model_type
        self.raw = raw
        self._names: dict[str, str] = known["names"]
        self._defaults: dict[str, Any] = known["defaults"]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`; what is missing takes the model's default, None stays None."""
        actual = self._names.get(name, name)
        for source, key in ((self.raw, actual), (self.raw, name), (self._defaults, actual)):
            if key in source:
                return source[key]
        return default

    def number(self, name: str) -> int:
        """The value of `name`, a whole number that is not negative.

        Raises:
            PlanError: missing, or something else.
        """
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PlanError(
                f"config.json of a {self.model_type!r} model has {name} = {value!r}; "
                "the planner needs a whole number there."
            )
        return value

    def first(self, *names: str) -> int:
        """The first of `names` that is set, as a whole number."""
        for name in names[:-1]:
            if self.get(name) is not None:
                return self.number(name)
        return self.number(names[-1])

    def names(self, name: str) -> list[str] | None:
        """The value of `name`, a list of words; None if it is not set.

        Raises:
            PlanError: something else.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise PlanError(
                f"config.json of a {self.model_type!r} model has {name} = {value!r}; "
                "the planner needs a list of words there."
            )
        return list(value)


def text_settings(config: dict[str, Any]) -> Settings:
    """The settings of the part of `config` that generates text.

    Raises:
        PlanError: no model_type, an unknown one, or a missing text section.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise PlanError("this config.json names no model_type; pass a transformers config.json.")
    section = _table().get(model_type, {}).get("text")
    if section is None:
        return Settings(config, model_type)
    key, default_type = section
    text = config.get(key)
    if not isinstance(text, dict):
        raise PlanError(
            f"config.json of a {model_type!r} model has no {key!r} section; "
            "write it with save_pretrained, then plan again."
        )
    return Settings(text, text.get("model_type") or default_type)
