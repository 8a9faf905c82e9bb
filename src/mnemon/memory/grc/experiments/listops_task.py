"""ListOps as a task of classification."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from mnemon.memory.grc.experiments import listops
from mnemon.memory.grc.experiments.arms import Arm, assemble
from mnemon.memory.grc.experiments.classifier import SequenceClassifier
from mnemon.memory.grc.experiments.scales import Scale, Size
from mnemon.memory.grc.experiments.training import Run, Task

__all__ = ["Batch", "ListOpsTask", "order_of"]

_TRAIN_SEED, _TEST_SEED = 20_261, 20_262
_POOL = 16  # batches that are sorted by length together: less padding, order still random


class Batch(NamedTuple):
    """Expressions of about one length.

    Args:
        ids: places in the vocabulary.
        real: False at padding.
        values: what the expressions are worth.
    """

    ids: Int[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    values: Int[Tensor, " batch"]


@final
class ListOpsTask(Task):
    """The value of a nested expression."""

    name: ClassVar[str] = "listops"
    title: ClassVar[str] = "ListOps"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    num_seeds: ClassVar[int] = 5

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        long = size == "large"
        self.settings = listops.ListOps(
            shortest=500 if long else 30,
            longest=self.scale.length,
            depth=10 if long else 5,
        )

    @staticmethod
    def scales() -> dict[Size, Scale]:
        """The large one is that of the paper's experiment."""
        return {
            "small": Scale(
                dim=64,
                num_heads=4,
                num_layers=2,
                hidden=128,
                memory_length=32,
                batch=8,
                length=150,
                steps=500,
                rate=3e-3,
                train_count=8_000,
                test_count=2_000,
            ),
            "large": Scale(
                dim=512,
                num_heads=8,
                num_layers=6,
                hidden=2048,
                memory_length=64,
                batch=32,
                length=2000,
                steps=5000,
                rate=5e-4,
                train_count=96_000,
                test_count=2_000,
            ),
        }

    def start(self, arm: Arm, seed: int) -> Run:
        """Every seed has other weights and another order of the same expressions."""
        scale = self.scale

        def factory(hidden: int) -> nn.Module:
            return SequenceClassifier(
                len(listops.VOCABULARY),
                longest=scale.length,
                classes=listops.CLASSES,
                dim=scale.dim,
                num_heads=scale.num_heads,
                num_layers=scale.num_layers,
                hidden=hidden,
            )

        model = assemble(factory, arm, seed, hidden=scale.hidden, memory=self.memory)
        return _Run(self, model.to(self.device), seed)

    def facts(self) -> dict[str, Any]:
        """How often the most frequent value occurs in the test, and how long expressions are."""
        test = self.test
        values = Counter(expression.value for expression in test)
        value, count = values.most_common(1)[0]
        return {
            "majority_value": value,
            "majority_accuracy": count / len(test),
            "mean_tokens": sum(len(expression.tokens) for expression in test) / len(test),
            "train_expressions": self.scale.train_count,
            "test_expressions": len(test),
        }

    @property
    def train(self) -> Sequence[listops.Expression]:
        """What is trained on."""
        return _expressions(self.settings, _TRAIN_SEED, self.scale.train_count)

    @property
    def test(self) -> Sequence[listops.Expression]:
        """What is judged by; none of it is trained on."""
        trained = {expression.tokens for expression in self.train}
        found = _expressions(self.settings, _TEST_SEED, self.scale.test_count)
        return [expression for expression in found if expression.tokens not in trained]


@functools.lru_cache(maxsize=4)
def _expressions(
    settings: listops.ListOps, seed: int, count: int
) -> tuple[listops.Expression, ...]:
    return tuple(islice(listops.generate(settings, seed), count))


def order_of(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches: random, but of samples of about one length.

    Args:
        lengths: of all samples, tokens.
        batch: samples of a batch; what is left over at the end is left out.
        seed: of the run.
        epoch: from 0.
    """
    generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for begin in range(0, len(order), batch * _POOL):
        pool = sorted(order[begin : begin + batch * _POOL], key=lengths.__getitem__)
        whole = len(pool) - len(pool) % batch
        batches += [pool[at : at + batch] for at in range(0, whole, batch)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[place] for place in shuffled]


@final
class _Run(Run):
    def __init__(self, task: ListOpsTask, model: nn.Module, seed: int) -> None:
        self.model = model
        self._task = task
        self._seed = seed
        self._train = task.train
        self._lengths = [len(expression.tokens) for expression in self._train]
        self._epoch = -1
        self._order: list[list[int]] = []

    def loss(self, step: int) -> Tensor:
        batch = self._task.scale.batch
        per_epoch = len(self._train) // (batch * _POOL) * _POOL
        per_epoch += len(self._train) % (batch * _POOL) // batch
        epoch, place = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = order_of(self._lengths, batch, self._seed, epoch)
        found = self._batch([self._train[i] for i in self._order[place]])
        return functional.cross_entropy(self.model(found.ids, found.real), found.values)

    def score(self) -> float:
        test = sorted(self._task.test, key=lambda expression: len(expression.tokens))
        right = 0
        for begin in range(0, len(test), 100):
            found = self._batch(test[begin : begin + 100])
            said = self.model(found.ids, found.real).argmax(dim=-1)
            right += int((said == found.values).sum())
        return right / len(test)

    def _batch(self, expressions: Sequence[listops.Expression]) -> Batch:
        rows = [torch.tensor(listops.encode(expression.tokens)) for expression in expressions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=listops.PADDING)
        values = torch.tensor([expression.value for expression in expressions])
        device = self._task.device
        return Batch(ids.to(device), (ids != listops.PADDING).to(device), values.to(device))
