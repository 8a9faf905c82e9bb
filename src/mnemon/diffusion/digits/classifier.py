"""What an image of a digit shows, and features to compare sets of images by.

A small convolutional network, trained on the digits' training half when it is asked for (a few
seconds), always with the same numbers drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemon.diffusion.digits.data import CLASSES, SIDE, load_digits

__all__ = ["FEATURES", "Classifier", "frechet_distance", "train_classifier"]

FEATURES = 32
_EPOCHS = 12
_BATCH = 64
_SHARPEST = 0.3  # of the noise added to an image while training, in units of half the range


class Judgement(NamedTuple):
    """What the classifier says of images."""

    labels: Int[Tensor, " images"]
    features: Float[Tensor, "images features"]


class Classifier(NamedTuple):
    """A trained network.

    Args:
        network: images to features to logits.
        accuracy: on the held-out half, which it has not seen.
    """

    network: nn.Sequential
    accuracy: float

    def judge(self, images: Float[Tensor, "images 1 8 8"]) -> Judgement:
        """Classes and features of images in [-1, 1]."""
        with torch.no_grad():
            features = self.network[:-1](images.float())
            logits = self.network[-1](features)
        return Judgement(logits.argmax(-1), features)


def train_classifier(*, seed: int = 0) -> Classifier:
    """Trains on the training half, under noise; the same seed gives the same network.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    digits = load_digits("train")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _network()
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        steps = _EPOCHS * (len(digits.labels) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
        done = 0
        while done < steps:
            order = torch.randperm(len(digits.labels), generator=generator)
            for rows in order.split(_BATCH):
                if len(rows) < _BATCH or done == steps:
                    break
                images = digits.images[rows]
                noise = torch.randn(images.shape, generator=generator)
                level = _SHARPEST * torch.rand(len(rows), 1, 1, 1, generator=generator)
                loss = nn.functional.cross_entropy(
                    network(images + level * noise), digits.labels[rows], label_smoothing=0.05
                )
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
                done += 1
    network.eval().requires_grad_(False)
    held_out = load_digits("held_out")
    classifier = Classifier(network, 0.0)
    right = classifier.judge(held_out.images).labels == held_out.labels
    return classifier._replace(accuracy=right.float().mean().item())


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(48 * (SIDE // 2) ** 2, FEATURES),
        nn.SiLU(),
        nn.Linear(FEATURES, CLASSES),
    )


def frechet_distance(
    ours: Float[Tensor, "images features"], others: Float[Tensor, "other_images features"]
) -> float:
    """The distance of two Gaussians with the means and covariances of these features.

    With few images it is large between any two sets of them; compare only at equal numbers.

    Source: Fréchet inception distance (arXiv 1706.08500), eq. 6.
    """
    mean_a, cov_a = _moments(ours)
    mean_b, cov_b = _moments(others)
    root = _root(cov_a)
    cross = _root(root @ cov_b @ root).trace()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise ValueError(f"{len(features)} images came; a covariance takes 2 at least")
    wide = features.double()
    return wide.mean(0), wide.T.cov()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root
