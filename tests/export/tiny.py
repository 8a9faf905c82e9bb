"""Tiny random models of the architectures that export serves."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = 6
MIXED = ["sliding_attention", "full_attention"]


def _bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=100,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=256,
    )
    return transformers.BartForConditionalGeneration(config)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        vocab_size=100,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
    )
    return transformers.OPTForCausalLM(config)


def _jamba() -> PreTrainedModel:
    config = transformers.JambaConfig(
        **BASE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    return transformers.JambaForCausalLM(config)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**BASE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**BASE, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**BASE, sliding_window=WINDOW)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**BASE, head_dim=16, sliding_window=WINDOW, layer_types=MIXED)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**BASE, pad_token_id=0)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    ),
    "opt": _opt,
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)
    ),
    "jamba": _jamba,  # Mamba and attention
    "bart": _bart,
    "t5": _t5,
}


def build(name: str) -> PreTrainedModel:
    """A random model, ready to run, that never stops by itself."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None  # BART's
    return model
