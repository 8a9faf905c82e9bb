"""Sampling from a transformer that was trained with flow matching.

diffusers' `DiTPipeline` asks its scheduler to scale the model's input, which
`FlowMatchEulerDiscreteScheduler` does not know: such a pipeline saves and loads, and is sampled
from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnemon.diffusion.digits.data import NO_CLASS, SIDE
from mnemon.errors import ZooError

__all__ = ["sample_flow"]


@torch.no_grad()
def sample_flow(
    transformer: nn.Module,
    class_labels: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 2.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "images 1 8 8"]:
    """Images in about [-1, 1], by Euler steps from sigma 1 (noise) to 0.

    Args:
        transformer: says noise - image, given timesteps 1000 sigma.
        class_labels: one digit per image.
        steps: of the solver.
        guidance_scale: above 1, conditional and unconditional answers come from one batch.
        generator: of the noise, on the CPU.

    Raises:
        ZooError: no steps.
    """
    if steps < 1:
        raise ZooError(f"{steps} steps came; at least 1 is needed")
    device = next(transformer.parameters()).device
    count = len(class_labels)
    images = torch.randn(count, 1, SIDE, SIDE, generator=generator).to(device)
    labels = torch.tensor(list(class_labels), device=device)
    guided = guidance_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    levels = torch.linspace(1, 0, steps + 1).tolist()
    for now, then in itertools.pairwise(levels):
        inputs = torch.cat([images, images]) if guided else images
        times = torch.full((len(inputs),), 1000 * now, device=device)
        said = transformer(inputs, timestep=times, class_labels=labels).sample
        if guided:
            wanted, free = said.chunk(2)
            said = free + guidance_scale * (wanted - free)
        images = images + (then - now) * said
    return images
