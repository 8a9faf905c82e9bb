"""A decoder with latent attention, as remote code was written for transformers 4.39."""

import math
import warnings
from typing import List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS, is_torch_greater_or_equal_than_1_13
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_greater_or_equal_2_10,
    logging,
    replace_return_docstrings,
)
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_deepseek_v2 import OldDeepseekV2Config

_FLASH = is_flash_attn_2_available() and is_flash_attn_greater_or_equal_2_10()

if is_torch_fx_available():
    if not is_torch_greater_or_equal_than_1_13:
        import torch.fx

    _prepare_4d_causal_attention_mask = torch.fx.wrap(_prepare_4d_causal_attention_mask)

logger = logging.get_logger(__name__)
_CONFIG_FOR_DOC = "OldDeepseekV2Config"


class DeepseekV2RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


ALL_LAYERNORM_LAYERS.append(DeepseekV2RMSNorm)


def rotary(x, position_ids, theta):
    """x: [batch, heads, tokens, dim], pairs interleaved as DeepSeek stores them."""
    b, h, t, d = x.shape
    x = x.view(b, h, t, d // 2, 2).transpose(4, 3).reshape(b, h, t, d)
    inv_freq = theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    angles = position_ids[:, None, :, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), dim=-1)
    return x * angles.cos() + half * angles.sin()


class DeepseekV2Attention(nn.Module):
    def __init__(self, config: OldDeepseekV2Config, layer_idx: Optional[int] = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.qk_nope, self.qk_rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_head_dim = self.qk_nope + self.qk_rope
        self.v_head_dim = config.v_head_dim
        self.rank = config.kv_lora_rank
        size = config.hidden_size
        self.q_proj = nn.Linear(size, self.num_heads * self.q_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(size, self.rank + self.qk_rope, bias=False)
        self.kv_a_layernorm = DeepseekV2RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(
            self.rank, self.num_heads * (self.qk_nope + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, size, bias=False)
        self.softmax_scale = self.q_head_dim ** (-0.5)
        if self.config.rope_scaling is not None:
            factor = self.config.rope_scaling["factor"]
            if self.config.rope_scaling["type"] != "yarn":
                raise ValueError(f"unknown scaling {self.config.rope_scaling['type']}")
            self.softmax_scale *= (0.1 * math.log(factor) + 1.0) ** 2

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_value: Optional[Cache] = None,
        use_cache: bool = False,
        **kwargs,
    ) -> Tuple[torch.Tensor, Optional[Cache]]:
        if "padding_mask" in kwargs:
            warnings.warn("padding_mask is not used any more")
        bsz, q_len, _ = hidden_states.size()
        q = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, -1).transpose(1, 2)
        q_nope, q_pe = torch.split(q, [self.qk_nope, self.qk_rope], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        compressed, k_pe = torch.split(compressed, [self.rank, self.qk_rope], dim=-1)
        k_pe = k_pe.view(bsz, q_len, 1, self.qk_rope).transpose(1, 2)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed))
        kv = kv.view(bsz, q_len, self.num_heads, -1).transpose(1, 2)
        k_nope, value_states = torch.split(kv, [self.qk_nope, self.v_head_dim], dim=-1)
        kv_seq_len = value_states.shape[-2]
        if past_key_value is not None:
            if self.layer_idx is None:
                raise ValueError("a layer without an index cannot be cached")
            kv_seq_len += past_key_value.get_usable_length(kv_seq_len, self.layer_idx)

        q_pe = rotary(q_pe, position_ids, self.config.rope_theta)
        k_pe = rotary(k_pe, position_ids, self.config.rope_theta)
        query_states = torch.cat([q_nope, q_pe], dim=-1)
        key_states = torch.cat([k_nope, k_pe.expand(-1, self.num_heads, -1, -1)], dim=-1)
        if past_key_value is not None:
            cache_kwargs = {"sin": None, "cos": None}
            key_states, value_states = past_key_value.update(
                key_states, value_states, self.layer_idx, cache_kwargs
            )
        attn_weights = query_states @ key_states.transpose(2, 3) * self.softmax_scale
        if attn_weights.size() != (bsz, self.num_heads, q_len, kv_seq_len):
            raise ValueError(f"attention of shape {attn_weights.size()}, {kv_seq_len} tokens")
        assert attention_mask is not None
        attn_weights = F.softmax(attn_weights + attention_mask, dim=-1, dtype=torch.float32)
        attn_output = (attn_weights @ value_states).transpose(1, 2).reshape(bsz, q_len, -1)
        return self.o_proj(attn_output), past_key_value


class DeepseekV2DecoderLayer(nn.Module):
    def __init__(self, config: OldDeepseekV2Config, layer_idx: int):
        super().__init__()
        self.self_attn = DeepseekV2Attention(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        attended, present = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), present


class OldDeepseekV2PreTrainedModel(PreTrainedModel):
    config_class = OldDeepseekV2Config
    base_model_prefix = "model"
    _no_split_modules = ["DeepseekV2DecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_cache_class = True

    def _init_weights(self, module):
        std = 0.02
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class OldDeepseekV2Model(OldDeepseekV2PreTrainedModel):
    def __init__(self, config: OldDeepseekV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DeepseekV2DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self._use_flash_attention_2 = config._attn_implementation == "flash_attention_2"
        self.norm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
    ) -> Union[Tuple, BaseModelOutputWithPast]:
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        past_key_values_length = 0
        if use_cache:
            use_legacy_cache = not isinstance(past_key_values, Cache)
            if use_legacy_cache:
                past_key_values = DynamicCache.from_legacy_cache(past_key_values)
            past_key_values_length = past_key_values.get_usable_length(seq_length)
        if position_ids is None:
            position_ids = torch.arange(
                past_key_values_length,
                seq_length + past_key_values_length,
                dtype=torch.long,
                device=inputs_embeds.device,
            ).unsqueeze(0)
        if self._use_flash_attention_2:
            attention_mask = attention_mask if 0 in attention_mask else None
        else:
            attention_mask = _prepare_4d_causal_attention_mask(
                attention_mask, (batch_size, seq_length), inputs_embeds, past_key_values_length
            )
        hidden_states = inputs_embeds
        next_decoder_cache = None
        for decoder_layer in self.layers:
            hidden_states, next_decoder_cache = decoder_layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=past_key_values,
                use_cache=use_cache,
            )
        next_cache = None
        if use_cache:
            next_cache = (
                next_decoder_cache.to_legacy_cache() if use_legacy_cache else next_decoder_cache
            )
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values=next_cache)


class OldDeepseekV2ForCausalLM(OldDeepseekV2PreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = OldDeepseekV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @replace_return_docstrings(output_type=CausalLMOutputWithPast, config_class=_CONFIG_FOR_DOC)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> Union[Tuple, CausalLMOutputWithPast]:
        r"""
        Returns:
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.lm_head(outputs[0]).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        first_step = past_key_values is None
        if not first_step:
            limit = None
            if isinstance(past_key_values, Cache):
                held = past_key_values.get_seq_length()
                read = past_key_values.seen_tokens
                limit = past_key_values.get_max_length()
            else:
                held = read = past_key_values[0][0].shape[2]
            # The mask may be longer than the tokens: then part of the past came without its ids.
            surplus = 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
            if surplus > 0:
                input_ids = input_ids[:, read - attention_mask.shape[1] :]
            elif read < input_ids.shape[1]:
                input_ids = input_ids[:, read:]
            if limit is not None and attention_mask is not None:
                if held + input_ids.shape[1] > limit:
                    attention_mask = attention_mask[:, -limit:]

        position_ids = kwargs.get("position_ids")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            if past_key_values:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        inputs = {"inputs_embeds": inputs_embeds} if first_step and inputs_embeds is not None else {}
        return (inputs or {"input_ids": input_ids}) | {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(
            tuple(states.index_select(0, beam_idx.to(states.device)) for states in pair)
            for pair in past_key_values
        )
