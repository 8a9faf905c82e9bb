"""What several training processes tell one another; all of it does nothing in a single one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_gradients", "mean_over_ranks", "num_ranks", "process_group", "this_rank"]


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def this_rank() -> int:
    """This process's number, 0 for the one that writes files."""
    return dist.get_rank() if num_ranks() > 1 else 0


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of what the ranks give; outside autograd. Every rank has to call it."""
    count = num_ranks()
    if count == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / count


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the ranks, in one message."""
    if num_ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = mean.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started; without torchrun there is nothing to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
