"""scikit-learn's digits, classified by a small ViT."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mnemon.errors import DependencyError
from mnemon.memory.grc.experiments.arms import Arm, assemble
from mnemon.memory.grc.experiments.classifier import ImageClassifier
from mnemon.memory.grc.experiments.scales import Scale, Size
from mnemon.memory.grc.experiments.training import Run, Task

__all__ = ["DigitsTask", "Images"]

_SIDE, _PATCH, _CLASSES = 8, 2, 10
_SPLIT_SEED = 20_260


class Images(NamedTuple):
    """Images in [-1, 1] and what they show."""

    pixels: Float[Tensor, "images 1 8 8"]
    labels: Int[Tensor, " images"]


@final
class DigitsTask(Task):
    """Handwritten digits of 8 x 8 pixels, in patches of 2 x 2."""

    name: ClassVar[str] = "digits"
    title: ClassVar[str] = "Digits"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    num_seeds: ClassVar[int] = 3

    @staticmethod
    def scales() -> dict[Size, Scale]:
        """An image is 16 tokens in both."""
        small = Scale(
            dim=48,
            num_heads=4,
            num_layers=3,
            hidden=96,
            memory_length=16,
            batch=64,
            length=16,
            steps=300,
            rate=2e-3,
            train_count=1_000,
            test_count=797,
        )
        large = Scale(
            dim=512,
            num_heads=8,
            num_layers=6,
            hidden=2048,
            memory_length=16,
            batch=64,
            length=16,
            steps=5000,
            rate=2e-4,
            train_count=1_000,
            test_count=797,
        )
        return {"small": small, "large": large}

    def start(self, arm: Arm, seed: int) -> Run:
        """Every seed has other weights and another order; the split is the same."""
        scale = self.scale

        def factory(hidden: int) -> nn.Module:
            return ImageClassifier(
                side=_SIDE,
                patch=_PATCH,
                classes=_CLASSES,
                dim=scale.dim,
                num_heads=scale.num_heads,
                num_layers=scale.num_layers,
                hidden=hidden,
            )

        model = assemble(factory, arm, seed, hidden=scale.hidden, memory=self.memory)
        return _Run(self, model.to(self.device), seed)

    def facts(self) -> dict[str, Any]:
        """How often the most frequent digit occurs in the test."""
        labels = self.images(train=False).labels.tolist()
        value, count = Counter(labels).most_common(1)[0]
        return {
            "majority_value": value,
            "majority_accuracy": count / len(labels),
            "train_images": self.scale.train_count,
            "test_images": len(labels),
        }

    def images(self, *, train: bool) -> Images:
        """One part, always the same."""
        found = _digits()
        count = self.scale.train_count
        part = slice(None, count) if train else slice(count, count + self.scale.test_count)
        return Images(found.pixels[part].to(self.device), found.labels[part].to(self.device))


@functools.lru_cache(maxsize=1)
def _digits() -> Images:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the digits come with scikit-learn, which is not installed; "
            "pip install 'mnemon[diffusion]'"
        ) from error
    found = datasets.load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 8 - 1  # 0 .. 16 -> -1 .. 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return Images(pixels[order], labels[order])


@final
class _Run(Run):
    def __init__(self, task: DigitsTask, model: nn.Module, seed: int) -> None:
        self.model = model
        self._seed, self._batch = seed, task.scale.batch
        self._train, self._test = task.images(train=True), task.images(train=False)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        rows = torch.randint(len(self._train.labels), (self._batch,), generator=generator)
        rows = rows.to(self._train.labels.device)
        said = self.model(self._train.pixels[rows])
        return functional.cross_entropy(said, self._train.labels[rows])

    def score(self) -> float:
        said = self.model(self._test.pixels).argmax(dim=-1)
        return float((said == self._test.labels).double().mean())
