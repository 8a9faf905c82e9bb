"""Class accuracy and feature distance of digits: what a classifier says of the images."""

from __future__ import annotations

from torch import Tensor

from mnemon.diffusion.digits.classifier import Classifier, frechet_distance

__all__ = ["Judge"]


class Judge:
    """Judges sets of images that were made from the same noise.

    Distances are to uncached images of other noise. What the uncached images themselves have is
    therefore the floor: two sets from one model differ by that much.

    Args:
        classifier: of digits.
        labels: the class that each image was asked to show.
        others: uncached images of other noise, as many.
    """

    def __init__(self, classifier: Classifier, labels: list[int], others: Tensor) -> None:
        self._classifier, self._labels = classifier, labels
        self._features = classifier.judge(others).features

    def __call__(self, images: Tensor) -> tuple[float, float | None]:
        """Class accuracy, and the distance (None if one image is all there is)."""
        found = self._classifier.judge(images)
        right = sum(a == b for a, b in zip(found.labels.tolist(), self._labels, strict=True))
        distance = None if len(images) < 2 else frechet_distance(found.features, self._features)
        return right / len(self._labels), distance
