"""A decoder that takes whatever cache it is handed for a tuple of pairs, as much code does."""

import math
from typing import Optional, Tuple, Union

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_indexed_pairs import IndexedPairsConfig


class PairAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, past):
        batch, new, size = x.shape
        q, k, v = (
            part.view(batch, new, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(size, dim=-1)
        )
        if past is not None:
            past.update(k, v, self.layer_idx)
            # Read back through the pair rather than through what update returned.
            k, v = past[self.layer_idx]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, new, size))


class PairBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = PairAttention(config, layer_idx)
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, mask, past):
        x = x + self.attn(self.ln_1(x), mask, past)
        return x + self.proj(torch.relu(self.fc(self.ln_2(x))))


class IndexedPairsForCausalLM(PreTrainedModel):
    config_class = IndexedPairsConfig
    base_model_prefix = "model"
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList([PairBlock(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def cached_length(past_key_values) -> int:
        for key, _value in past_key_values:
            return 0 if key is None else key.shape[-2]
        return 0

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Union[Cache, Tuple]] = None,
        use_cache: Optional[bool] = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        elif isinstance(past_key_values, (tuple, list)):
            past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        length = 0 if past_key_values is None else self.cached_length(past_key_values)
        new, total = input_ids.shape[1], length + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], total, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        rows = torch.arange(length, total)[:, None]
        seen = (torch.arange(total)[None] <= rows) & attention_mask[:, None, None, :].bool()
        x = self.wte(input_ids) + self.wpe(position_ids)
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for block in self.h:
            x = block(x, mask, past_key_values)
        if past_key_values is not None:
            assert {key.shape[-2] for key, value in past_key_values} == {total}
        return CausalLMOutputWithPast(
            logits=self.head(self.ln_f(x)), past_key_values=past_key_values if use_cache else None
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None:
            length = self.cached_length(past_key_values)
            input_ids = input_ids[:, length:] if length < input_ids.shape[1] else input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": kwargs.get("attention_mask"),
            "use_cache": kwargs.get("use_cache"),
        }

    def _reorder_cache(self, past_key_values, beam_idx):
        return tuple(
            tuple(states.index_select(0, beam_idx.to(states.device)) for states in pair)
            for pair in past_key_values
        )
