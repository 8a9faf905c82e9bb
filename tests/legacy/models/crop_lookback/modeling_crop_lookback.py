"""A decoder that looks a bounded way back by cutting its cache to a final size, `crop(n)`."""

import math
from typing import Optional

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_crop_lookback import CropLookbackConfig


class Attend(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, past_key_values):
        batch, new, size = x.shape
        q, k, v = (
            part.view(batch, new, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, cache_kwargs=None)
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, new, size))
        return x + torch.tanh(self.mix(x))


class CropLookbackForCausalLM(PreTrainedModel):
    """Before every step but the first the last token is taken back and read again.

    Code of this kind (prompt caches, corrected transcripts, self-speculation) calls `crop` with
    the size that the cache is to have.
    """

    config_class = CropLookbackConfig
    base_model_prefix = "model"
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([Attend(config, i) for i in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[DynamicCache] = None,
        use_cache: Optional[bool] = None,
        **kwargs,
    ):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = past + input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], total, dtype=torch.long)
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        keys, rows = torch.arange(total)[None], torch.arange(past, total)[:, None]
        seen = (keys <= rows) & (keys > rows - self.config.lookback)
        seen = seen[None, None] & attention_mask[:, None, None].bool()
        x = self.tokens(input_ids) + self.places(places)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() > 1:
            past_key_values.crop(past_key_values.get_seq_length() - 1)
            past_key_values.crop(input_ids.shape[1])  # longer than it is: nothing to cut
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": kwargs.get("attention_mask"),
            "use_cache": kwargs.get("use_cache"),
        }

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
