"""A model small enough to run a command in a test, and a way to run one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from mnemon.cli import app
from mnemon.zoo import bundled_model_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONTEXT = 512


def save_tiny(folder: Path, *, seed: int = 0, chat_template: bool = True) -> Path:
    """Write a random two-layer Llama with the bundled tokenizer; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if chat_template or "chat" not in name:
            shutil.copy(bundled_model_path() / name, folder)
    return folder


def run(*arguments: str | Path, text: str | None = None) -> Result:
    """Run ``mnemon ARGUMENTS`` with `text` on standard input, in this process."""
    words = [str(word) for word in arguments]
    result = CliRunner().invoke(app.build(words[0]), words, input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback for the user: never right
    return result


def run_json(*arguments: str | Path, text: str | None = None) -> Any:
    """The JSON document that ``mnemon ARGUMENTS --json`` prints."""
    result = run(*arguments, "--json", text=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
