"""An orthonormal rotation that spreads a head's outliers over all its dimensions."""

import torch
from torch import Tensor

__all__ = ["rotate", "rotation_size"]


def rotation_size(width: int) -> int:
    """The largest power of two that divides `width`: the rotation acts on pieces of that size."""
    return width & -width


def rotate(x: Tensor) -> Tensor:
    """Rotate ``[..., width]`` by Hadamard matrices; its own inverse, in the dtype that came.

    Source:
        Sylvester's construction; the fast Walsh-Hadamard transform, log2(size) sums per number.
    """
    width = x.shape[-1]
    size = rotation_size(width)
    if size == 1:
        return x
    out = x.to(torch.float32).reshape(-1, size)
    step = 1
    while step < size:
        pairs = out.view(-1, size // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        out = torch.stack([first + second, first - second], dim=2).view(-1, size)
        step *= 2
    return out.mul(float(size) ** -0.5).view(x.shape).to(x.dtype)
