"""What a transformer with experts holds, and what one token of it costs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mnemon.diffusion.diffmoe.place import moe_layers

__all__ = ["Cost", "cost"]


class Cost(NamedTuple):
    """Parameters, and multiply-adds of the mixtures for one token at the trained capacity."""

    parameters: int
    activated_parameters: int  # an expert counted as often as a token uses it: capacity / experts
    expert_macs: float  # capacity times the dense feed-forwards that they replaced
    dense_macs: int  # those
    router_macs: int
    predictor_macs: int


def cost(transformer: nn.Module) -> Cost:
    """Counts; products only, as is customary. Biases, activations and norms are left out."""
    parameters = sum(p.numel() for p in transformer.parameters())
    idle = expert = 0.0
    dense = router = predictor = 0
    for layer in moe_layers(transformer):
        held = sum(p.numel() for p in layer.experts.parameters())
        idle += held * (1 - layer.capacity / layer.num_experts)
        one = 2 * layer.experts.dim * layer.experts.hidden_dim
        dense += one
        expert += layer.capacity * one
        router += layer.router.weight.numel()
        linears = (m for m in layer.modules() if isinstance(m, nn.Linear))
        predictor += sum(m.weight.numel() for m in linears) - layer.router.weight.numel()
    return Cost(parameters, round(parameters - idle), expert, dense, router, predictor)
