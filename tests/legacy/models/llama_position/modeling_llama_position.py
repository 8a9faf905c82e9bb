"""A decoder as modeling files were written for transformers 4.42 to 4.47."""

import math
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import add_start_docstrings_to_model_forward, logging

from .configuration_llama_position import LlamaPositionConfig

logger = logging.get_logger(__name__)

INPUTS_DOCSTRING = "input_ids: tokens, [batch, new]; cache_position: where they stand."


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Rotary(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        # Not saved with the weights: what __init__ computes has to survive loading.
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        freqs = position_ids[:, :, None].float() * self.inv_freq
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaPositionConfig, layer_idx: Optional[int] = None):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary_emb = Rotary(self.head_dim, config.rope_theta)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_value: Optional[Cache] = None,
        cache_position: Optional[torch.LongTensor] = None,
    ) -> Tuple[torch.Tensor, Optional[Cache]]:
        bsz, q_len, _ = hidden_states.size()
        q = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, -1).transpose(1, 2)
        k = self.k_proj(hidden_states).view(bsz, q_len, self.num_kv_heads, -1).transpose(1, 2)
        v = self.v_proj(hidden_states).view(bsz, q_len, self.num_kv_heads, -1).transpose(1, 2)
        cos, sin = self.rotary_emb(v, position_ids)
        q, k = rotate(q, k, cos, sin)
        if past_key_value is not None:
            cache_kwargs = {"sin": sin, "cos": cos, "cache_position": cache_position}
            k, v = past_key_value.update(k, v, self.layer_idx, cache_kwargs)
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :, : k.shape[-2]]
        out = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return self.o_proj(out.transpose(1, 2).reshape(bsz, q_len, -1)), past_key_value


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaPositionConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN["silu"]
        self.input_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        attended, present = self.self_attn(self.input_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        inner = self.act(self.up_proj(self.post_norm(hidden_states)))
        return hidden_states + self.down_proj(inner), present


class LlamaPositionPreTrainedModel(PreTrainedModel):
    config_class = LlamaPositionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_cache_class = True
    _supports_static_cache = True


class LlamaPositionModel(LlamaPositionPreTrainedModel):
    def __init__(self, config: LlamaPositionConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @add_start_docstrings_to_model_forward(INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Union[Cache, List[torch.FloatTensor]]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        cache_position: Optional[torch.LongTensor] = None,
    ) -> BaseModelOutputWithPast:
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        return_legacy_cache = False
        if use_cache and not isinstance(past_key_values, Cache):
            return_legacy_cache = True
            if past_key_values is None:
                past_key_values = DynamicCache()
            else:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)

        if cache_position is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            cache_position = torch.arange(
                past_seen_tokens, past_seen_tokens + inputs_embeds.shape[1], device=inputs_embeds.device
            )
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)

        mask = self._update_causal_mask(attention_mask, inputs_embeds, cache_position, past_key_values)
        hidden_states = inputs_embeds
        for decoder_layer in self.layers:
            hidden_states, next_cache = decoder_layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                cache_position=cache_position,
            )
        next_cache = next_cache if use_cache else None
        if return_legacy_cache:
            next_cache = next_cache.to_legacy_cache()
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values=next_cache)

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position, past_key_values):
        past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        dtype, device = input_tensor.dtype, input_tensor.device
        new = input_tensor.shape[1]
        if isinstance(past_key_values, StaticCache):
            target_length = past_key_values.get_max_cache_shape()
        elif attention_mask is not None:
            target_length = attention_mask.shape[-1]
        else:
            target_length = past_seen_tokens + new
        lowest = torch.finfo(dtype).min
        mask = torch.full((new, target_length), lowest, dtype=dtype, device=device)
        mask = mask * (torch.arange(target_length, device=device) > cache_position.reshape(-1, 1))
        mask = mask[None, None].expand(input_tensor.shape[0], 1, -1, -1).clone()
        if attention_mask is not None:
            length = attention_mask.shape[-1]
            padding = (mask[:, :, :, :length] + attention_mask[:, None, None, :]) == 0
            mask[:, :, :, :length] = mask[:, :, :, :length].masked_fill(padding, lowest)
        return mask


class LlamaPositionForCausalLM(LlamaPositionPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaPositionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Union[Cache, List[torch.FloatTensor]]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cache_position: Optional[torch.LongTensor] = None,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs[0]).float(), past_key_values=outputs.past_key_values
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        cache_position=None,
        position_ids=None,
        use_cache=True,
        **kwargs,
    ):
        # cache_position says which of the tokens are new.
        if past_key_values is not None and inputs_embeds is not None:
            input_ids = input_ids[:, -cache_position.shape[0] :]
        elif past_key_values is not None and input_ids.shape[1] != cache_position.shape[0]:
            input_ids = input_ids[:, cache_position]
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids.contiguous()}
        if inputs_embeds is not None and cache_position[0] == 0:
            inputs = {"inputs_embeds": inputs_embeds}
        return inputs | {
            "position_ids": position_ids,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "attention_mask": attention_mask,
        }
