"""Forecasts of a time series, patch by patch, as remote code was written for 4.40."""

import math
from typing import Optional

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .configuration_sundial import OldSundialConfig


class SundialAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.ffn = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, past_key_value: Optional[Cache]):
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        kv_seq_len = k.shape[-2]
        if past_key_value is not None:
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)
            k, v = past_key_value.update(k, v, self.layer_idx)
        rows = torch.arange(kv_seq_len - x.shape[1], kv_seq_len)[:, None]
        hidden = torch.arange(kv_seq_len)[None] > rows
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
        x = x + self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + torch.tanh(self.ffn(x))


class OldSundialForPrediction(PreTrainedModel):
    config_class = OldSundialConfig
    base_model_prefix = "model"
    _supports_cache_class = True

    def __init__(self, config: OldSundialConfig):
        super().__init__(config)
        self.embed = nn.Linear(config.input_token_len, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            [SundialAttention(config, i) for i in range(config.num_hidden_layers)]
        )
        self.head = nn.Linear(config.hidden_size, config.output_token_len)
        self.post_init()

    def forward(self, input_ids: torch.FloatTensor, past_key_values=None, use_cache=None, **kwargs):
        patches = input_ids.unfold(-1, self.config.input_token_len, self.config.input_token_len)
        past_key_values_length = 0
        use_legacy_cache = False
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(patches.shape[1])
        x = self.embed(patches)
        x = x + self.places.weight[past_key_values_length : past_key_values_length + x.shape[1]]
        for layer in self.layers:
            x = layer(x, past_key_values if use_cache else None)
        next_cache = None
        if use_cache:
            next_cache = past_key_values.to_legacy_cache() if use_legacy_cache else past_key_values
        return MoeCausalLMOutputWithPast(logits=torch.tanh(self.head(x)), past_key_values=next_cache)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None:
            if isinstance(past_key_values, DynamicCache):
                past_length = past_key_values.seen_tokens
                assert past_key_values.get_max_length() is None
            else:
                past_length = past_key_values[0][0].shape[2]
            input_ids = input_ids[:, past_length * self.config.input_token_len :]
        return {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}

    @torch.no_grad()
    def forecast(self, series: torch.Tensor, num_patches: int, use_cache: bool = True, cache=None):
        """The next `num_patches` patches of `series`, [batch, steps]; tuples without `cache`."""
        past = cache
        for _ in range(num_patches):
            inputs = self.prepare_inputs_for_generation(series, past, use_cache=use_cache)
            outputs = self(**inputs)
            past = outputs.past_key_values
            series = torch.cat([series, outputs.logits[:, -1]], dim=-1)
        return series
