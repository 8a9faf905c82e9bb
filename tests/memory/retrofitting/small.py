"""Models small enough to retrofit in a test."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mnemon.memory.retrofitting.data import Batch
from mnemon.zoo import bundled_model_path

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def small_model(family: str = "llama", *, vocab_size: int = 64, seed: int = 0) -> PreTrainedModel:
    """A random causal model of two layers, two KV heads and four query heads."""
    make_config, make_model = FAMILIES[family]
    torch.manual_seed(seed)
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = make_model(config).eval()
    return model


def save_folder(folder: Path, family: str = "llama") -> Path:
    """A model's folder with the bundled tokenizer."""
    small_model(family, vocab_size=4096).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(bundled_model_path() / name, folder)
    return folder


def random_rows(step: int, *, rows: int = 2, tokens: int = 24, vocab_size: int = 64) -> Batch:
    """The same for the same step."""
    generator = torch.Generator().manual_seed(step)
    return Batch(torch.randint(3, vocab_size, (rows, tokens), generator=generator))
