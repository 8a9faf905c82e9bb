"""Language modelling on the Python library's sources, byte by byte, segment after segment."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from mnemon.memory.grc.blocks.decoder import DecoderState, RecurrentDecoder
from mnemon.memory.grc.experiments.arms import Arm, assemble
from mnemon.memory.grc.experiments.scales import Scale, Size
from mnemon.memory.grc.experiments.training import Run, Task
from mnemon.zoo.corpus import load_documents, split

__all__ = ["LanguageTask", "Sources"]

_BYTES = 256
_STREAMS = 64  # held-out text is read in as many streams at a time


class Sources(NamedTuple):
    """Text as bytes: to train on, and from files that are kept from training."""

    train: UInt8[Tensor, " train_bytes"]
    held_out: UInt8[Tensor, " held_out_bytes"]


@final
class LanguageTask(Task):
    """The next byte of Python source, in streams of segments that a memory connects."""

    name: ClassVar[str] = "lm"
    title: ClassVar[str] = "Language modelling"
    metric: ClassVar[str] = "bits per byte"
    higher_is_better: ClassVar[bool] = False
    num_seeds: ClassVar[int] = 3

    @staticmethod
    def scales() -> dict[Size, Scale]:
        """Without a memory a model sees `length` bytes at most."""
        small = Scale(
            dim=64,
            num_heads=4,
            num_layers=2,
            hidden=128,
            memory_length=16,
            batch=16,
            length=16,
            steps=500,
            rate=4e-3,
            train_count=0,
            test_count=128,
        )
        large = Scale(
            dim=512,
            num_heads=8,
            num_layers=6,
            hidden=2048,
            memory_length=256,
            batch=32,
            length=256,
            steps=5000,
            rate=5e-4,
            train_count=0,
            test_count=32,
        )
        return {"small": small, "large": large}

    def start(self, arm: Arm, seed: int) -> Run:
        """Every seed has other weights and reads other places; what is held out is the same."""
        scale = self.scale

        def factory(hidden: int) -> nn.Module:
            return RecurrentDecoder(
                _BYTES,
                dim=scale.dim,
                num_heads=scale.num_heads,
                num_layers=scale.num_layers,
                hidden=hidden,
                recurrence=scale.memory_length if arm.recurrence else 0,
            )

        model = assemble(factory, arm, seed, hidden=scale.hidden, memory=self.memory)
        return _Run(self, model.to(self.device), seed)

    def facts(self) -> dict[str, Any]:
        """What is read, and what a model would get that knows only how often each byte occurs."""
        sources = _sources()
        counts = torch.bincount(sources.train.long(), minlength=_BYTES).double() + 1
        bits = -(counts / counts.sum()).log2()
        seen = self.held_out().long()
        return {
            "train_bytes": len(sources.train),
            "judged_bytes": seen.numel(),
            "bits_of_byte_frequencies": float(bits[seen].mean()),
        }

    def held_out(self) -> UInt8[Tensor, "streams bytes"]:
        """Streams of files that are not trained on, side by side; the first byte is given."""
        text = _sources().held_out
        wanted = self.scale.test_count * self.scale.length + 1
        streams = min(_STREAMS, len(text) // wanted)
        starts = torch.linspace(0, len(text) - wanted, streams).long()
        return torch.stack([text[start : start + wanted] for start in starts.tolist()])


@functools.lru_cache(maxsize=1)
def _sources() -> Sources:
    """All sources of the running Python, without its documentation."""
    documents = [document for document in load_documents() if document.name.endswith(".py")]
    parts = []
    for chosen in split(documents):
        joined = "\n".join(document.text for document in chosen).encode()
        parts.append(torch.frombuffer(bytearray(joined), dtype=torch.uint8))
    return Sources(*parts)


@final
class _Run(Run):
    def __init__(self, task: LanguageTask, model: nn.Module, seed: int) -> None:
        self.model = model
        self._task = task
        self._text = _sources().train
        generator = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(len(self._text), (task.scale.batch,), generator=generator)
        self._state: DecoderState | None = None

    def loss(self, step: int) -> Tensor:
        length = self._task.scale.length
        places = torch.arange(length + 1) + step * length
        at = (self._starts[:, None] + places) % len(self._text)
        bits, self._state = self._bits(self._text[at], self._state)
        return bits * math.log(2)

    def score(self) -> float:
        text, length = self._task.held_out(), self._task.scale.length
        state: DecoderState | None = None
        total, count = 0.0, self._task.scale.test_count
        for segment in range(count):
            part = text[:, segment * length : (segment + 1) * length + 1]
            bits, state = self._bits(part, state)
            total += float(bits)
        return total / count

    def _bits(
        self, text: Int[Tensor, "streams bytes"], state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        """Mean bits per byte of a segment, each byte from those before."""
        ids = text.long().to(self._task.device)
        said, after = self.model(ids[:, :-1], state)
        loss = functional.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten())
        return loss / math.log(2), after
