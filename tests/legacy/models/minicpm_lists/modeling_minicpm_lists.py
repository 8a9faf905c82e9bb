"""A decoder that takes key_cache and value_cache in hand, as code did from 4.36 to 4.55."""

import math
from typing import Optional

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_minicpm_lists import MiniCpmListsConfig


class ListAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, past_key_value: Optional[Cache]):
        batch, new, size = x.shape
        q, k, v = (
            part.view(batch, new, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if past_key_value is not None:
            if len(past_key_value.key_cache) <= self.layer_idx:
                past_key_value.update(k, v, self.layer_idx)
            else:
                # Joined by hand, as code did that keeps a window or merges two caches.
                held = past_key_value.key_cache[self.layer_idx]
                past_key_value.key_cache[self.layer_idx] = torch.cat([held, k], dim=2)
                held = past_key_value.value_cache[self.layer_idx]
                past_key_value.value_cache[self.layer_idx] = torch.cat([held, v], dim=2)
                if self.layer_idx == 0:
                    past_key_value._seen_tokens += new
            k = past_key_value.key_cache[self.layer_idx]
            v = past_key_value.value_cache[self.layer_idx]
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, new, size))


class ListLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = ListAttention(config, layer_idx)
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, past_key_value):
        x = x + self.attn(self.norm_1(x), mask, past_key_value)
        return x + torch.tanh(self.fc(self.norm_2(x)))


class MiniCpmListsForCausalLM(PreTrainedModel):
    config_class = MiniCpmListsConfig
    base_model_prefix = "llm"
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([ListLayer(config, i) for i in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[Cache] = None,
        use_cache: Optional[bool] = None,
        **kwargs,
    ):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0
        if past_key_values is not None and len(past_key_values.key_cache):
            past = past_key_values.key_cache[0].size(-2)
            assert past == past_key_values._seen_tokens
            # Moved to where the model is, as code with several devices does on every step.
            for i in range(len(past_key_values.key_cache)):
                past_key_values.key_cache[i] = past_key_values.key_cache[i].to(self.embed.weight.device)
                past_key_values.value_cache[i] = past_key_values.value_cache[i].to(self.embed.weight.device)
        total = past + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], total, dtype=torch.long)
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        seen = torch.ones(total, total, dtype=torch.bool).tril()[past:]
        seen = seen[None, None] & attention_mask[:, None, None].bool()
        x = self.embed(input_ids) + self.places(places)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return CausalLMOutputWithPast(
            logits=self.lm_head(x), past_key_values=past_key_values if use_cache else None
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None and len(past_key_values.key_cache) > 0:
            input_ids = input_ids[:, past_key_values.key_cache[0].shape[2] :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": kwargs.get("attention_mask"),
            "use_cache": kwargs.get("use_cache"),
        }

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.key_cache = [keys[beam_idx] for keys in past_key_values.key_cache]
        past_key_values.value_cache = [values[beam_idx] for values in past_key_values.value_cache]
        return past_key_values
