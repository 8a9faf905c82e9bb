"""The bundled model's shape and its optimisers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 4096
ROPE_THETA = 10_000_000.0


def model_config(*, vocab_size: int, **overrides: Any) -> LlamaConfig:
    """The bundled model's configuration: 4 layers, 256 wide, 4 query and 2 KV heads of 64.

    The RoPE base is large so that part of every head hardly turns over 4,096 tokens and
    can match by content at any distance.
    """
    from transformers import LlamaConfig

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 1056,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_theta": ROPE_THETA,
    }
    shape.update(overrides)
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **shape,
    )


def build_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in float32, the same for the same seed."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def build_optimisers(
    model: LlamaForCausalLM, *, matrix_lr: float, other_lr: float
) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    Args:
        model: the model to train.
        matrix_lr: Muon's rate, matched to AdamW's update size.
        other_lr: AdamW's rate.

    Returns:
        The optimisers; each group keeps its full rate as ``base_lr``.
    """
    import torch

    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimisers: list[Optimizer] = [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers
