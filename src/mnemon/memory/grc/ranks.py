"""Means over the samples of all ranks, without gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, distributed

__all__ = ["mean_over_ranks", "several_ranks"]


def several_ranks() -> bool:
    """Whether torch.distributed runs with more than one rank."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def mean_over_ranks(
    mean: Float[Tensor, "*shape"], count: Float[Tensor, ""], otherwise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The mean of all samples, where each rank brings the mean of its own.

    One all_reduce of sum and count together, in float32 or better: ranks may have different
    numbers of samples, also none. Every rank has to call it.

    Args:
        mean: of this rank's samples.
        count: how many they are.
        otherwise: what to return where no rank has a sample.
    """
    exact = torch.promote_types(mean.dtype, torch.float32)
    count = count.detach().to(exact)
    flat = torch.cat([(mean.detach().to(exact) * count).flatten(), count.reshape(1)])
    distributed.all_reduce(flat)
    total = flat[-1]
    found = (flat[:-1] / total.clamp(min=1)).view_as(mean).to(mean.dtype)
    return torch.where(total > 0, found, otherwise)
