"""scikit-learn's bundled digits as tensors: 1,797 images of 8 x 8 pixels, ten classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mnemon.errors import DependencyError

__all__ = ["CLASSES", "NO_CLASS", "SIDE", "Digits", "load_digits"]

SIDE = 8
CLASSES = 10
NO_CLASS = 1000  # what diffusers' DiTPipeline calls "no class", whatever the number of classes
_SPLIT_SEED = 20_260
_HELD_OUT = 360


class Digits(NamedTuple):
    """Images in [-1, 1] and what they show."""

    images: Float[Tensor, "images 1 8 8"]
    labels: Int[Tensor, " images"]


def load_digits(part: str = "train") -> Digits:
    """One part of the images, always the same ones.

    Args:
        part: "train" (1,437 images) or "held_out" (360).

    Raises:
        DependencyError: scikit-learn is not installed.
        ValueError: another part.
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part {part!r} came; expected 'train' or 'held_out'")
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the digits come with scikit-learn, which is not installed; "
            "pip install 'mnemon[diffusion]'"
        ) from error
    found = datasets.load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1  # 0 .. 16 -> -1 .. 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    chosen = order[_HELD_OUT:] if part == "train" else order[:_HELD_OUT]
    return Digits(images[chosen], labels[chosen])
