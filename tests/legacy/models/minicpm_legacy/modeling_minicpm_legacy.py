"""A decoder as remote code was written for transformers 4.36: a cache inside, tuples outside."""

import math
from typing import List, Optional, Tuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import is_torch_greater_or_equal_than_1_13

from .configuration_minicpm_legacy import MiniCpmLegacyConfig

assert is_torch_greater_or_equal_than_1_13


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary_pos_emb(x, position_ids, base):
    dim = x.shape[-1]
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=x.device)
    freqs = position_ids[:, None, :, None].float() / base ** (steps / dim)
    emb = torch.cat((freqs, freqs), dim=-1)
    return x * emb.cos() + rotate_half(x) * emb.sin()


class MiniCpmAttention(nn.Module):
    def __init__(self, config: MiniCpmLegacyConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.base = config.num_attention_heads, config.rope_theta
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_value: Optional[Cache] = None,
    ):
        bsz, q_len, size = hidden_states.size()
        shape = (bsz, q_len, self.num_heads, size // self.num_heads)
        query_states = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query_states = apply_rotary_pos_emb(query_states, position_ids, self.base)
        key_states = apply_rotary_pos_emb(key_states, position_ids, self.base)
        kv_seq_len = key_states.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_seq_length(self.layer_idx)
            key_states, value_states = past_key_value.update(
                key_states, value_states, self.layer_idx, cache_kwargs={"base": self.base}
            )
        attn_weights = query_states @ key_states.transpose(2, 3) / math.sqrt(shape[-1])
        if attn_weights.size() != (bsz, self.num_heads, q_len, kv_seq_len):
            raise ValueError(f"attention of shape {attn_weights.size()}")
        if attention_mask is not None:
            attn_weights = attn_weights + attention_mask
        attn_output = attn_weights.softmax(-1) @ value_states
        attn_output = attn_output.transpose(1, 2).reshape(bsz, q_len, size)
        return self.o_proj(attn_output), past_key_value


class MiniCpmLayer(nn.Module):
    def __init__(self, config: MiniCpmLegacyConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MiniCpmAttention(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        self.scale = 1.4 / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states, **kwargs):
        attended, present = self.self_attn(self.ln1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended * self.scale
        fed = self.down(nn.functional.silu(self.gate(self.ln2(hidden_states))))
        return hidden_states + fed * self.scale, present


class MiniCpmLegacyPreTrainedModel(PreTrainedModel):
    config_class = MiniCpmLegacyConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniCpmLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_cache_class = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class MiniCpmLegacyForCausalLM(MiniCpmLegacyPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [MiniCpmLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Tuple:
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        batch_size, seq_length = input_ids.shape[:2]
        past_key_values_length = 0
        use_legacy_cache = False
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if past_key_values is None:
                past_key_values = DynamicCache()
            elif use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(
                past_key_values_length, seq_length + past_key_values_length, device=input_ids.device
            ).unsqueeze(0)
        hidden_states = self.embed_tokens(input_ids)
        attention_mask = _prepare_4d_causal_attention_mask(
            attention_mask, (batch_size, seq_length), hidden_states, past_key_values_length
        )
        next_decoder_cache = None
        for layer in self.layers:
            hidden_states, next_decoder_cache = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=past_key_values if use_cache else None,
            )
        next_cache = None
        if use_cache:
            next_cache = (
                next_decoder_cache.to_legacy_cache() if use_legacy_cache else next_decoder_cache
            )
        logits = self.lm_head(self.norm(hidden_states)).float()
        if return_dict is False:
            return (logits, next_cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=next_cache)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                past_length = past_key_values.get_seq_length()
            else:
                past_length = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, past_length:]
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(
            tuple(state.index_select(0, beam_idx.to(state.device)) for state in pair)
            for pair in past_key_values
        )
