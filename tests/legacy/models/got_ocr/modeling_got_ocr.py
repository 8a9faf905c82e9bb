"""A picture read in the first step, tokens after it, as remote code was written for 4.37."""

import math
from typing import Optional, Tuple, Union

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import AttentionMaskConverter
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_got_ocr import GotOcrConfig


class GotAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, past_key_value: Optional[Cache] = None):
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        kv_seq_len = k.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)
            k, v = past_key_value.update(k, v, self.layer_idx, {"sin": None, "cos": None})
        assert k.shape[-2] == kv_seq_len
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class GotLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = GotAttention(config, layer_idx)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, past_key_value):
        x = x + self.self_attn(self.norm(x), mask, past_key_value)
        return x + nn.functional.gelu(self.mlp(x))


class GotOcrForCausalLM(PreTrainedModel):
    config_class = GotOcrConfig
    base_model_prefix = "model"
    _supports_cache_class = True

    def __init__(self, config: GotOcrConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.mm_projector = nn.Linear(config.image_size, config.hidden_size)
        self.layers = nn.ModuleList([GotLayer(config, i) for i in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Union[Cache, Tuple]] = None,
        use_cache: Optional[bool] = None,
        images: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ):
        past_key_values_length = 0
        if use_cache:
            if not isinstance(past_key_values, Cache):
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(input_ids.shape[1])
        embeds = self.embed_tokens(input_ids)
        if images is not None and (input_ids.shape[1] != 1 or self.training):
            features = self.mm_projector(images).flatten(0, 1)
            embeds = embeds.clone()
            embeds[input_ids == self.config.image_token_id] = features
        if position_ids is None:
            position_ids = torch.arange(
                past_key_values_length, past_key_values_length + input_ids.shape[1]
            ).unsqueeze(0)
        x = embeds + self.embed_positions(position_ids)
        total = past_key_values_length + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], total, dtype=torch.long)
        mask = AttentionMaskConverter(is_causal=True).to_4d(
            attention_mask, input_ids.shape[1], dtype=x.dtype, key_value_length=total
        )
        for layer in self.layers:
            x = layer(x, mask, past_key_values if use_cache else None)
        return CausalLMOutputWithPast(
            logits=self.lm_head(x).float(), past_key_values=past_key_values if use_cache else None
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        if past_key_values is not None:
            if isinstance(past_key_values, Cache):
                past_length = past_key_values.seen_tokens
                if past_key_values.get_max_length() is not None:
                    raise ValueError("a bounded cache was not foreseen")
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
            "images": kwargs.get("images"),
        }
