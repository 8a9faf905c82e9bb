"""Windows in every other layer and a HybridCache, as written for transformers 4.42 to 4.57."""

import math
from typing import Optional

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, HybridCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_gemma_hybrid import GemmaHybridConfig


class HybridAttention(nn.Module):
    def __init__(self, config: GemmaHybridConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.sliding_window = config.sliding_window if layer_idx % 2 == 0 else None
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, position_ids, padding, past_key_value, cache_position):
        batch, new, size = hidden_states.shape
        q = self.q_proj(hidden_states).view(batch, new, self.heads, -1).transpose(1, 2)
        k = self.k_proj(hidden_states).view(batch, new, self.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(hidden_states).view(batch, new, self.kv_heads, -1).transpose(1, 2)
        if past_key_value is not None:
            cache_kwargs = {
                "sliding_window": self.sliding_window,
                "cache_position": cache_position,
            }
            k, v = past_key_value.update(k, v, self.layer_idx, cache_kwargs)
        mask = self.mask(k.shape[-2], padding, past_key_value, cache_position, q.dtype)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = (torch.tanh(q @ k.mT / math.sqrt(self.head_dim) / 50) * 50 + mask).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, new, size))

    def mask(self, num_keys, padding, past_key_value, cache_position, dtype):
        """Which of the `num_keys` keys each new token sees."""
        last = int(cache_position[-1])
        fixed = isinstance(past_key_value, HybridCache)
        if fixed and self.sliding_window is None:
            first = 0
        elif fixed:  # the window stays in place until it is full, then it slides
            first = max(0, last + 1 - num_keys)
        else:
            first = last + 1 - num_keys
        keys = torch.arange(first, first + num_keys)[None]
        rows = cache_position[:, None]
        seen = keys <= rows
        if self.sliding_window is not None:
            seen = seen & (keys > rows - self.sliding_window)
        seen = seen[None, None]
        if padding is not None:
            columns = torch.nn.functional.pad(padding.bool(), (0, max(0, first + num_keys - padding.shape[1])))
            seen = seen & columns[:, None, None, first : first + num_keys]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class HybridLayer(nn.Module):
    def __init__(self, config: GemmaHybridConfig, layer_idx: int):
        super().__init__()
        self.attn = HybridAttention(config, layer_idx)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.pre = nn.LayerNorm(config.hidden_size)
        self.post = nn.LayerNorm(config.hidden_size)

    def forward(self, x, *args):
        x = x + self.attn(self.pre(x), *args)
        return x + self.down(nn.functional.gelu(self.up(self.post(x)), approximate="tanh"))


class GemmaHybridPreTrainedModel(PreTrainedModel):
    config_class = GemmaHybridConfig
    base_model_prefix = "model"
    _no_split_modules = ["HybridLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_cache_class = True
    _supports_static_cache = True


class GemmaHybridForCausalLM(GemmaHybridPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config: GemmaHybridConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            [HybridLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        use_cache: Optional[bool] = None,
        cache_position: Optional[torch.LongTensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> CausalLMOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            # Windows are cut by the mask here, so the cache keeps all.
            past_key_values = DynamicCache()
        if cache_position is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_ids, attention_mask, past_key_values, cache_position
            )
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.norm(hidden_states)),
            past_key_values=past_key_values if use_cache else None,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        cache_position=None,
        position_ids=None,
        use_cache=True,
        **kwargs,
    ):
        if past_key_values is not None:
            input_ids = input_ids[:, -cache_position.shape[0] :]
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids[:, -input_ids.shape[1] :]
        if isinstance(past_key_values, HybridCache):
            assert past_key_values.get_max_cache_shape() >= cache_position[-1]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "attention_mask": attention_mask,
        }
