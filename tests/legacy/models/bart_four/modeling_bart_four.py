"""An encoder-decoder that keeps four tensors a layer: own keys and values, the encoder's two."""

import math
from typing import Optional, Tuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .configuration_bart_four import BartFourConfig


class FourAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x, encoded=None, past_key_value=None, mask=None):
        q = self.split(self.q_proj(x))
        if encoded is not None and past_key_value is not None:
            k, v = past_key_value  # the encoder does not change: read again
        elif encoded is not None:
            k, v = self.split(self.k_proj(encoded)), self.split(self.v_proj(encoded))
        else:
            k, v = self.split(self.k_proj(x)), self.split(self.v_proj(x))
            if past_key_value is not None:
                k = torch.cat([past_key_value[0], k], dim=2)
                v = torch.cat([past_key_value[1], v], dim=2)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return self.out_proj(out), (k, v)


class FourEncoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, config, embed_tokens, embed_positions):
        super().__init__()
        self.embed_tokens, self.embed_positions = embed_tokens, embed_positions
        self.attn = FourAttention(config)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        return BaseModelOutput(self.norm(x + self.attn(x, mask=additive(attention_mask))[0]))


def additive(attention_mask):
    if attention_mask is None:
        return None
    hidden = attention_mask[:, None, None, :] == 0
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


class FourDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = FourAttention(config)
        self.encoder_attn = FourAttention(config)
        self.norm_1, self.norm_2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.fc = nn.Linear(config.d_model, config.d_model)

    def forward(self, x, encoded, mask, encoder_mask, past_key_value: Optional[Tuple]):
        own = past_key_value[:2] if past_key_value is not None else None
        cross = past_key_value[-2:] if past_key_value is not None else None
        out, own = self.self_attn(self.norm_1(x), past_key_value=own, mask=mask)
        x = x + out
        out, cross = self.encoder_attn(
            self.norm_2(x), encoded=encoded, past_key_value=cross, mask=encoder_mask
        )
        x = x + out
        return x + torch.tanh(self.fc(x)), own + cross


class BartFourForConditionalGeneration(PreTrainedModel):
    config_class = BartFourConfig
    base_model_prefix = "model"

    def __init__(self, config: BartFourConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.places = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.encoder = FourEncoder(config, self.shared, self.places)
        self.layers = nn.ModuleList([FourDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self):
        return self.encoder

    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.Tensor] = None,
        decoder_input_ids: Optional[torch.LongTensor] = None,
        encoder_outputs=None,
        past_key_values: Optional[Tuple] = None,
        use_cache: Optional[bool] = None,
        **kwargs,
    ):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if isinstance(past_key_values, EncoderDecoderCache):
            # What `generate` of 4.4x hands in at the first step; tuples from then on.
            filled = len(past_key_values) > 0 and past_key_values[0][0] is not None
            past_key_values = past_key_values.to_legacy_cache() if filled else None
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        new = decoder_input_ids.shape[1]
        x = self.shared(decoder_input_ids) + self.places.weight[past_length : past_length + new]
        mask = torch.full((new, past_length + new), torch.finfo(x.dtype).min)
        mask = torch.triu(mask, diagonal=past_length + 1)
        presents = ()
        for index, layer in enumerate(self.layers):
            past = past_key_values[index] if past_key_values is not None else None
            x, present = layer(x, encoder_outputs[0], mask, additive(attention_mask), past)
            presents += (present,)
        return Seq2SeqLMOutput(
            logits=self.lm_head(x), past_key_values=presents if use_cache else None
        )

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids,
        past_key_values=None,
        attention_mask=None,
        use_cache=None,
        encoder_outputs=None,
        **kwargs,
    ):
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            past_length = past_key_values[0][0].shape[2]
            decoder_input_ids = decoder_input_ids[:, past_length:]
        return {
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
            "decoder_input_ids": decoder_input_ids,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        # The encoder's half is the same in all beams of a row.
        return tuple(
            tuple(state.index_select(0, beam_idx) for state in past[:2]) + past[2:]
            for past in past_key_values
        )
