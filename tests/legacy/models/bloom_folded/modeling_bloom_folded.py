"""Keys [batch * heads, head_dim, tokens], values [batch * heads, tokens, head_dim], as Bloom had."""

import math
from typing import Optional, Tuple

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel

from .configuration_bloom_folded import BloomFoldedConfig


def alibi_bias(attention_mask, heads):
    slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)])
    places = (attention_mask.cumsum(-1) - 1) * attention_mask
    bias = slopes[None, :, None] * places[:, None, :].float()
    return bias.reshape(-1, 1, attention_mask.shape[1])


class FoldedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, bias, mask, layer_past: Optional[Tuple[torch.Tensor, torch.Tensor]]):
        batch, new, size = x.shape
        fused = self.query_key_value(x).view(batch, new, self.heads, 3, self.head_dim)
        query, key, value = (part.permute(0, 2, 1, 3).flatten(0, 1) for part in fused.unbind(3))
        key = key.transpose(1, 2)
        if layer_past is not None:
            past_key, past_value = layer_past
            key = torch.cat((past_key, key), dim=2)
            value = torch.cat((past_value, value), dim=1)
        scores = torch.baddbmm(bias.expand(-1, new, -1), query, key, alpha=1 / math.sqrt(self.head_dim))
        weights = (scores.view(batch, self.heads, new, -1) + mask).softmax(-1).flatten(0, 1)
        out = torch.bmm(weights, value).view(batch, self.heads, new, self.head_dim)
        return self.dense(out.transpose(1, 2).reshape(batch, new, size)), (key, value)


class FoldedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attention = FoldedAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, bias, mask, layer_past):
        attended, present = self.self_attention(self.input_layernorm(x), bias, mask, layer_past)
        x = x + attended
        inner = nn.functional.gelu(self.dense_h_to_4h(self.post_attention_layernorm(x)))
        return x + self.dense_4h_to_h(inner), present


class BloomFoldedForCausalLM(PreTrainedModel):
    config_class = BloomFoldedConfig
    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_missing = [r"lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([FoldedBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor, torch.Tensor], ...]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        # 4.4x hands an empty cache where there used to be None: mended by looking inside.
        if past_key_values is None or past_key_values[0][0] is None:
            past_key_values = (None,) * len(self.h)
            past_length = 0
        else:
            past_length = past_key_values[0][0].shape[2]
        batch, new = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past_length + new, dtype=torch.long)
        rows = torch.arange(past_length, past_length + new)[:, None]
        seen = torch.arange(past_length + new)[None] <= rows
        seen = seen[None, None] & attention_mask[:, None, None].bool()
        bias = alibi_bias(attention_mask, self.config.num_attention_heads)
        x = self.word_embeddings(input_ids)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        presents = () if use_cache else None
        for block, layer_past in zip(self.h, past_key_values):
            x, present = block(x, bias, mask, layer_past)
            if use_cache:
                presents = presents + (present,)
        logits = self.lm_head(self.ln_f(x))
        return CausalLMOutputWithCrossAttentions(logits=logits, past_key_values=presents)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        if past_key_values is not None and past_key_values[0][0] is not None:
            input_ids = input_ids[:, -1:]
            # Standard layout, [batch, heads, ...]: what beam search reorders, and what users keep.
            if past_key_values[0][0].dim() == 4:
                past_key_values = self._fold(past_key_values)
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }

    @staticmethod
    def _fold(past):
        return tuple((key.flatten(0, 1), value.flatten(0, 1)) for key, value in past)

    def _unfold(self, past, batch):
        return tuple(
            (key.view(batch, -1, *key.shape[1:]), value.view(batch, -1, *value.shape[1:]))
            for key, value in past
        )

    def _reorder_cache(self, past, beam_idx):
        standard = self._unfold(past, len(beam_idx))
        picked = tuple(tuple(state.index_select(0, beam_idx) for state in pair) for pair in standard)
        return self._fold(picked)
