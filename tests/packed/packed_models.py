"""Tiny models of which a few hundred tokens are packed, and caches that they filled."""

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
    T5Config,
)

__all__ = ["MODELS", "VOCABULARY", "build", "prompt"]

VOCABULARY = 96
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def _configs() -> dict[str, Any]:
    decoder = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return {
        "llama": LlamaConfig(**_SMALL),
        "mistral": MistralConfig(**_SMALL, sliding_window=150),
        "gemma2": Gemma2Config(
            **_SMALL, sliding_window=150, query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "qwen3_next": Qwen3NextConfig(
            **_SMALL, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=32, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        ),
        "bart": BartConfig(
            vocab_size=VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, decoder_start_token_id=2, forced_eos_token_id=None, **decoder,
        ),
        "t5": T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=2, **decoder,
        ),
    }  # fmt: skip


MODELS = ("llama", "mistral", "gemma2", "qwen3_next", "bart", "t5")


@cache
def build(name: str) -> Any:
    config = _configs()[name]
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return family.from_config(config).eval()


def prompt(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, count), generator=generator)
