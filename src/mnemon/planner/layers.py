"""What every layer of a model keeps: values per token, and states of a fixed size."""

from __future__ import annotations

from typing import Any, NamedTuple

from mnemon.errors import PlanError
from mnemon.planner import layer_types as kinds
from mnemon.planner.families import BART_LIKE, ENCODER_DECODER, LATENT, T5_LIKE
from mnemon.planner.settings import Settings, text_settings
from mnemon.planner.states import StateValues, state_values

_ENTIRE_HEAD_DIM = ("cohere2",)  # hidden_size / heads, whatever the file says


class TokenShape(NamedTuple):
    """Keys and values of one token: heads, and numbers per head on either side."""

    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0


class LayerPlan(NamedTuple):
    """What one layer keeps for one sequence.

    Attributes:
        kind: the layer type, e.g. "full_attention"; "nothing" for a layer that keeps none.
        window: tokens that a query sees, itself included; None for all.
        shape: keys and values kept per token, in the model's dtype or packed.
        index_values: numbers kept per token beside them, for all tokens seen.
        states: numbers of a fixed size.
    """

    kind: str
    window: int | None = None
    shape: TokenShape = TokenShape()
    index_values: int = 0
    states: StateValues = StateValues(0, 0)

    @property
    def token_values(self) -> int:
        """Numbers kept per token: keys and values."""
        return self.shape.heads * (self.shape.key_dim + self.shape.value_dim)

    @property
    def is_boundable(self) -> bool:
        """Whether a policy decides which tokens it keeps."""
        return self.window is None and self.token_values > 0 and not self.index_values


class ModelPlan(NamedTuple):
    """A model as the planner sees it.

    Attributes:
        model_type: of the text part.
        layers: the decoder's layers.
        cross_values: numbers kept per encoder token, all layers; 0 without an encoder.
        source_tokens: encoder tokens where the model fixes them (Whisper), else None.
        max_tokens: positions the model was made for, if the config says.
        settings: the resolved config.
    """

    model_type: str
    layers: tuple[LayerPlan, ...]
    cross_values: int
    source_tokens: int | None
    max_tokens: int | None
    settings: Settings


def plan_model(config: dict[str, Any]) -> ModelPlan:
    """Work out what each layer of a model keeps.

    Args:
        config: the config.json as plain data; of a multimodal model the whole of it.

    Returns:
        The layers and what else the bytes of a cache depend on.

    Raises:
        PlanError: a model type, layer type or value that the planner does not know.
    """
    s = text_settings(config)
    types = kinds.layer_types(s)
    layers = tuple(_layer(s, kind, index) for index, kind in enumerate(types))
    cross = 0
    if s.model_type in ENCODER_DECODER:
        cross = sum(layer.token_values for layer in layers)
    source = s.number("max_source_positions") if s.model_type == "whisper" else None
    limit = s.get("max_position_embeddings")
    max_tokens = limit if isinstance(limit, int) and limit > 0 else None
    return ModelPlan(s.model_type, layers, cross, source, max_tokens, s)


def _layer(s: Settings, kind: str, index: int) -> LayerPlan:
    """The plan of layer `index`, which may have settings of its own."""
    if kind == kinds.NOTHING:
        return LayerPlan(kind)
    own = _own_settings(s, index)
    states = StateValues(0, 0)
    if kind in (kinds.LINEAR, kinds.CONV, kinds.HYBRID):
        states = state_values(s)
    if kind in (kinds.LINEAR, kinds.CONV):
        return LayerPlan(kind, states=states)
    window = None
    if kind in (kinds.SLIDING, kinds.CHUNKED):
        window = kinds.window(own)
        if not window:
            raise PlanError(f"a {s.model_type!r} config lists a {kind} layer but no window for it.")
    index_values = 0
    if kind == kinds.INDEXED:
        types = s.names("indexer_types")
        shares = types is not None and index < len(types) and types[index] == "shared"
        index_values = 0 if shares else s.number("index_head_dim")
    return LayerPlan(kind, window, _token_shape(own, kind), index_values, states)


def _own_settings(s: Settings, index: int) -> Settings:
    own = s.raw.get("per_layer_config")
    override = own.get(str(index)) if isinstance(own, dict) else None
    return Settings({**s.raw, **override}, s.model_type) if override else s


def _token_shape(s: Settings, kind: str) -> TokenShape:
    """Keys and values that one layer keeps per token."""
    name = s.model_type
    if name in LATENT:
        return TokenShape(1, s.number("kv_lora_rank"), s.number("qk_rope_head_dim"))
    if name in BART_LIKE or name == "trocr":
        heads = s.number("decoder_attention_heads")
        return TokenShape(heads, *(2 * [s.number("d_model") // heads]))
    if name in T5_LIKE:
        return TokenShape(s.number("num_heads"), *(2 * [s.number("d_kv")]))
    heads = _key_heads(s)
    if name in ("gemma4_text", "gemma4_unified_text") and kind == kinds.FULL:
        return _gemma4_full(s, heads)
    head_dim = _head_dim(s)
    if name == "mimo_v2_flash":
        heads *= 2 if kind == kinds.SLIDING else 1
        return TokenShape(heads, head_dim, s.number("v_head_dim"))
    return TokenShape(heads, head_dim, head_dim)


def _key_heads(s: Settings) -> int:
    name = s.model_type
    if name == "falcon":
        if s.get("new_decoder_architecture"):
            return s.first("num_kv_heads", "num_attention_heads")
        return 1 if s.get("multi_query") else s.number("num_attention_heads")
    if name == "dbrx":
        own = s.raw.get("attn_config") or {}
        return int(own.get("kv_n_heads", 1))
    if name == "gpt_bigcode" and s.get("multi_query"):
        return 1
    return s.first("num_key_value_heads", "num_attention_heads")


def _head_dim(s: Settings) -> int:
    if s.model_type == "jetmoe":
        return s.number("kv_channels")
    if s.model_type in ("zamba", "zamba2"):
        if s.get("attention_head_dim"):
            return s.number("attention_head_dim")
        return 2 * s.number("hidden_size") // s.number("num_attention_heads")
    if s.get("head_dim") and s.model_type not in (*_ENTIRE_HEAD_DIM, "recurrent_gemma"):
        return s.number("head_dim")
    return s.number("hidden_size") // s.number("num_attention_heads")


def _gemma4_full(s: Settings, heads: int) -> TokenShape:
    """Full layers of Gemma 4 have heads of their own, unless the file says so layer by layer."""
    if "per_layer_config" in s.raw:
        return TokenShape(heads, *(2 * [s.number("head_dim")]))
    shared = s.raw.get("num_global_key_value_heads")
    if shared is not None and s.get("attention_k_eq_v", True):
        heads = int(shared)
    return TokenShape(heads, *(2 * [int(s.raw.get("global_head_dim", 512))]))
