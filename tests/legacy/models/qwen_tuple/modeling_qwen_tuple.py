"""Tuples of [batch, tokens, heads, head_dim], mended for the empty caches of 4.4x."""

import math
from typing import Optional, Tuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_qwen_tuple import QwenTupleConfig


class QwenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.theta = config.num_attention_heads, config.rope_theta
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def turn(self, x, position_ids):
        half = x.shape[-1] // 2
        speeds = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = position_ids[:, :, None, None].float() * speeds
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def forward(self, hidden_states, position_ids, mask, layer_past=None, use_cache=False):
        batch, new, size = hidden_states.shape
        query, key, value = self.c_attn(hidden_states).split(size, dim=2)
        query = self.turn(query.view(batch, new, self.heads, -1), position_ids)
        key = self.turn(key.view(batch, new, self.heads, -1), position_ids)
        value = value.view(batch, new, self.heads, -1)
        if layer_past is not None:
            past_key, past_value = layer_past[0], layer_past[1]
            key = torch.cat((past_key, key), dim=1)
            value = torch.cat((past_value, value), dim=1)
        present = (key, value) if use_cache else None
        q, k, v = (part.permute(0, 2, 1, 3) for part in (query, key, value))
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(batch, new, size)), present


class QwenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = QwenAttention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, *args, **kwargs):
        attended, present = self.attn(self.ln_1(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended
        x = self.ln_2(hidden_states)
        return hidden_states + self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x))), present


class QwenTuplePreTrainedModel(PreTrainedModel):
    config_class = QwenTupleConfig
    base_model_prefix = "transformer"
    is_parallelizable = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class QwenTupleModel(QwenTuplePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QwenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor]]] = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
    ):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if past_key_values is None or past_key_values[0][0] is None:
            past_length = 0
            past_key_values = tuple([None] * len(self.h))
        else:
            past_length = past_key_values[0][0].size(-3)
        total = past_length + input_ids.shape[-1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], total, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:]
        causal = torch.tril(torch.ones(total, total, dtype=torch.bool))[past_length:]
        seen = causal[None, None] & attention_mask[:, None, None].bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden_states = self.wte(input_ids)
        presents = () if use_cache else None
        for block, layer_past in zip(self.h, past_key_values):
            hidden_states, present = block(
                hidden_states, position_ids, mask, layer_past=layer_past, use_cache=use_cache
            )
            if use_cache is True:
                presents = presents + (present,)
        return BaseModelOutputWithPast(self.ln_f(hidden_states), past_key_values=presents)


class QwenTupleLMHeadModel(QwenTuplePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QwenTupleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values[0][0] is not None:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": kwargs.get("attention_mask"),
        }

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple[Tuple[torch.Tensor]]] = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ):
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )
        logits = self.lm_head(outputs[0])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx: torch.Tensor):
        return tuple(
            tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer_past)
            for layer_past in past_key_values
        )

    def chat(self, input_ids, generation_config: Optional[GenerationConfig] = None, **kwargs):
        return self.generate(input_ids, generation_config=generation_config, **kwargs)
