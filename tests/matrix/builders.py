"""How the matrix makes a tiny model with random weights from a transformers config.

The numbers are small enough that a whole generation takes milliseconds, and chosen so that what a
cache does shows in the tokens: windows are passed several times, attention is sharp, and the token
embedding is faint next to what the layers write, so a forgotten key changes the next token.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY = 128
PAD, BOS, FIRST_ORDINARY = 0, 1, 4
WINDOW = 12
IMAGE_TOKEN = 3

Inputs = dict[str, Tensor]
MakeInputs = Callable[..., Inputs]

# What "tiny" means for every field name that configs use. A field that a config does not have is
# skipped, so that this is one table and not one per architecture.
TINY: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    # mixture of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # state space and linear attention
    "state_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # no dropout in eval, no end of text: every run generates its full length
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}

#: Which composed config a text config belongs to.
TEXT_PARTS: Mapping[str, str] = {"mllama_text_model": "mllama", "qwen2_vl_text": "qwen2_vl"}
CROSS_ATTENTION = re.compile("encoder_attn|EncDecAttention|cross_attn|crossattention")

#: MLA models share one key head of `qk_rope_head_dim` and take `head_dim` to mean it.
MLA: Mapping[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: the row's name, transformers' model type where there is one.
        family: decoder, moe, window, hybrid, mamba, mla, shared, compressed, encoder-decoder,
            speech or multimodal.
        build: makes the model in eval mode and the function that makes its inputs.
        fast: whether the row is in the subset that `make test` runs.
        model_type: what transformers calls it.
    """

    name: str
    family: str
    build: Callable[[], tuple[Any, MakeInputs]]
    fast: bool = False
    model_type: str = ""


def tiny_config(model_type: str, **fields: Any) -> Any:
    """A config of `model_type`, every known size small; `fields` win over the table."""
    config_class: Any
    if model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
    else:  # a part that only a composed config of transformers 4 makes
        config_class = CONFIG_MAPPING[TEXT_PARTS[model_type]].sub_configs["text_config"]
    if dataclasses.is_dataclass(config_class):
        known = {field.name for field in dataclasses.fields(config_class)}
    else:  # transformers 4
        known = set(inspect.signature(config_class.__init__).parameters)
    # Another name for a field counts where the field's own name is not in the table.
    known |= {name for name, field in config_class.attribute_map.items() if field not in TINY}
    values = {name: value for name, value in TINY.items() if name in known}
    return config_class(**{**values, **fields})


def set_weights(
    model: Any, embedding_std: float | None = None, seed: int = 0, gain: float = 1.6
) -> None:
    """Fill matrices and embeddings with normal numbers that make attention matter.

    Matrices get a standard deviation of `gain / sqrt(fan_in)`, which keeps the attention sharp and
    the logits far apart (about 1: float32 rounding cannot flip an argmax). Embeddings are faint,
    or a model with tied embeddings would repeat its last token whatever the cache holds. Vectors
    (norms, biases, decay rates of state-space layers) stay as the model initialised them.
    """
    generator = torch.Generator().manual_seed(seed)
    # Sinusoidal positions have a large constant part, which the token must stand out from.
    has_positions = model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False)
    if embedding_std is None:
        embedding_std = 1.0 if has_positions else 0.3
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or "A_log" in name or not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            if id(weight) in embeddings:
                weight.copy_(noise * embedding_std)
                continue
            # Centred: the mean of an activation function is the same for every token, and without
            # this it grows from layer to layer until every position predicts the same token.
            if min(weight.shape[-2:]) > 4:
                noise = noise - noise.mean(-1, keepdim=True)
                noise = noise - noise.mean(-2, keepdim=True)
            # What the decoder reads from the encoder must not drown what it reads from itself.
            strength = 0.5 * gain if CROSS_ATTENTION.search(name) else gain
            weight.copy_(noise * (strength / math.sqrt(weight.shape[-1])))


def disable_end_of_text(model: Any) -> None:
    """Every run generates its full length, so that lengths never hide a difference."""
    generation = model.generation_config
    generation.eos_token_id = None
    generation.forced_eos_token_id = None
    generation.forced_bos_token_id = None
    generation.pad_token_id = PAD
    generation.bos_token_id = BOS
    if model.config.is_encoder_decoder:
        generation.decoder_start_token_id = BOS


def perturbed(model: Any, scale: float = 0.02, seed: int = 7) -> Any:
    """A copy that mostly agrees with `model`: as an assistant, some drafts pass and some fail."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim >= 2 and weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                weight.add_(noise * scale * weight.std())
    return other


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Ordinary tokens [batch, length]; a run repeats, so that prompt lookup finds candidates."""
    generator = torch.Generator().manual_seed(1000 * length + batch + seed)
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY - 4, (batch, length), generator=generator)
    if length >= 12:
        ids[:, -3:] = ids[:, 2:5]
    return ids


def text_inputs(batch: int, length: int, padding: int = 0, seed: int = 0) -> Inputs:
    """Prompts; with padding, row i is left-padded by about `i * padding / (batch - 1)` tokens."""
    ids = token_ids(batch, length, seed)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(batch):
            num_padding = round(row * padding / max(1, batch - 1))
            ids[row, :num_padding] = PAD
            mask[row, :num_padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sequence_inputs(batch: int, length: int, padding: int = 0, seed: int = 0) -> Inputs:
    """An encoder input (right-padded where asked) and the beginning of the decoder's text."""
    inputs = text_inputs(batch, length, 0, seed)
    if padding:
        for row in range(batch):
            num_tokens = length - round(row * padding / max(1, batch - 1))
            inputs["input_ids"][row, num_tokens:] = PAD
            inputs["attention_mask"][row, num_tokens:] = 0
    return {**inputs, **decoder_prompt(batch, seed)}


def decoder_prompt(batch: int, seed: int) -> Inputs:
    ids = token_ids(batch, 5, seed + 50)
    ids[:, 0] = BOS
    return {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


def speech_inputs(
    num_features: int, num_frames: int, features_first: bool, with_mask: bool
) -> MakeInputs:
    """Random audio features and the beginning of the decoder's text."""

    def make(batch: int, length: int, padding: int = 0, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(batch + 17 * length + seed)
        shape = (num_features, num_frames) if features_first else (num_frames, num_features)
        inputs = {"input_features": torch.randn(batch, *shape, generator=generator)}
        if with_mask:
            mask = torch.ones(batch, num_frames, dtype=torch.long)
            if padding:
                mask[-1, num_frames - 4 :] = 0
            inputs["attention_mask"] = mask
        return {**inputs, **decoder_prompt(batch, seed)}

    return make


def waveform_inputs(num_samples: int) -> MakeInputs:
    """Random sound and the beginning of the decoder's text."""

    def make(batch: int, length: int, padding: int = 0, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(batch + 17 * length + seed)
        inputs = {"input_values": torch.randn(batch, num_samples, generator=generator)}
        inputs["attention_mask"] = torch.ones(batch, num_samples, dtype=torch.long)
        if padding:
            inputs["attention_mask"][-1, num_samples // 2 :] = 0
        return {**inputs, **decoder_prompt(batch, seed)}

    return make


def image_inputs(num_image_tokens: int, image_size: int) -> MakeInputs:
    """Prompts whose tokens 2..2+n stand for an image, and its random pixels."""

    def make(batch: int, length: int, padding: int = 0, seed: int = 0) -> Inputs:
        inputs = text_inputs(batch, length + num_image_tokens, 0, seed)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for row in range(batch):
            num_padding = round(row * padding / max(1, batch - 1)) if padding else 0
            ids[row, :num_padding] = PAD
            mask[row, :num_padding] = 0
            ids[row, num_padding + 2 : num_padding + 2 + num_image_tokens] = IMAGE_TOKEN
        generator = torch.Generator().manual_seed(batch + seed)
        pixels = torch.randn(batch, 3, image_size, image_size, generator=generator)
        return {**inputs, "pixel_values": pixels}

    return make


def class_for(model_type: str, head: str | None = None) -> Any:
    """The model class: `head` by name, or what transformers' auto classes name for generation."""
    name = head or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None or (head is None and CONFIG_MAPPING[model_type]().is_encoder_decoder):
        name = head or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name)


def untie(model: Any) -> None:
    """Give the output embedding its own weights: tied ones repeat the last token for ever."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in embedded:
            module.weight = nn.Parameter(module.weight.detach().clone())


def finish(
    model: Any, make_inputs: MakeInputs, embedding_std: float | None = None
) -> tuple[Any, MakeInputs]:
    """Weights, eval mode, no end of text."""
    untie(model)
    set_weights(model, embedding_std)
    disable_end_of_text(model)
    return model.eval(), make_inputs
