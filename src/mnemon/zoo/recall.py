"""What a model still knows of its prompt: recall accuracy by distance, and bits per byte.

Both measures can run through a cache of the caller's making, so that what the cache
forgets shows as a lower curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon.errors import ZooError
from mnemon.zoo import corpus
from mnemon.zoo.prompts import PromptMaker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISTANCES = (32, 64, 128, 256, 512, 1024, 1536, 2048, 2560, 3072, 3584)
MakeCache = Callable[[Any], Any]


class RecallPoint(NamedTuple):
    """Accuracy at one distance.

    Attributes:
        distance: tokens between an answer's token and its source.
        correct: prompts whose whole answer was decoded.
        samples: prompts tried.
        low: lower end of the 95% Wilson interval of the accuracy.
        high: upper end.
    """

    distance: int
    correct: int
    samples: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """The fraction of prompts answered in full."""
        return self.correct / self.samples


class BitsPerByte(NamedTuple):
    """How well text is predicted."""

    bits_per_byte: float
    num_bytes: int
    num_tokens: int


def wilson_interval(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a binomial proportion."""
    if samples < 1:
        raise ZooError(f"an interval needs at least one sample (got {samples})")
    share = correct / samples
    middle = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def held_out_filler() -> str:
    """The held-out documents of the running Python, joined: the default filler."""
    _, held_out = corpus.split(corpus.load_documents())
    return "\n".join(document.text for document in held_out)


def recall_by_distance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    distances: Sequence[int] = DISTANCES,
    samples: int = 100,
    task: str = "needle",
    filler: str | None = None,
    make_cache: MakeCache | None = None,
    batch_size: int = 10,
    seed: int = 0,
) -> list[RecallPoint]:
    """Measure how often a prompt's planted value is decoded, at each distance.

    The prompt is prefilled through the cache, then the answer is decoded greedily through
    it; a prompt counts only if every token of the answer is right.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer, the bundled one.
        distances: tokens from the answer back to its source.
        samples: prompts per distance.
        task: ``needle`` or ``pairs``, see `mnemon.zoo.prompts`.
        filler: the text between; the running Python's held-out documents when None.
        make_cache: from ``model.config`` to a fresh cache; the model's own default when None.
        batch_size: prompts run at once; all of a batch have one length.
        seed: the first prompt's seed; prompt ``i`` has ``seed + i``.

    Returns:
        One point per distance, in the order given.

    Raises:
        ZooError: fewer than one sample, an unknown task or an impossible distance.
    """
    if samples < 1 or batch_size < 1:
        raise ZooError(f"samples and batch_size are 1 or more (got {samples} and {batch_size})")
    maker = PromptMaker.build(tokenizer, held_out_filler() if filler is None else filler)
    points = []
    for distance in distances:
        prompts = [maker.make(task, distance=distance, seed=seed + i) for i in range(samples)]
        correct = 0
        for first in range(0, samples, batch_size):
            batch = prompts[first : first + batch_size]
            decoded = greedy_answers(
                model,
                [prompt.input_ids for prompt in batch],
                num_tokens=len(batch[0].answer_ids),
                make_cache=make_cache,
            )
            correct += sum(
                got == prompt.answer_ids for got, prompt in zip(decoded, batch, strict=True)
            )
        points.append(RecallPoint(distance, correct, samples, *wilson_interval(correct, samples)))
    return points


def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    make_cache: MakeCache | None = None,
) -> list[list[int]]:
    """Prefill prompts of one length through a cache and decode greedily.

    Args:
        model: a causal LM.
        prompts: [batch][tokens] token ids, all of one length.
        num_tokens: tokens to decode, 1 or more.
        make_cache: from ``model.config`` to a fresh cache, or None for the model's default.

    Returns:
        [batch][num_tokens] token ids.
    """
    import torch

    cache = None if make_cache is None else make_cache(model.config)
    step = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    decoded = []
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = output.logits[:, -1:].argmax(-1)  # [batch, 1]
            decoded.append(step)
    return [[int(token) for token in row] for row in torch.cat(decoded, dim=1)]


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Iterable[str],
    *,
    context: int = 1024,
    make_cache: MakeCache | None = None,
    chunk_tokens: int = 256,
) -> BitsPerByte:
    """Measure how many bits the model needs per byte of text.

    Each text is cut into windows of ``context - 1`` tokens, each opened by ``<|bos|>``;
    every token of a window is predicted from those before it in the window.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        texts: one text or several; each begins a window of its own.
        context: tokens per window, ``<|bos|>`` included.
        make_cache: when given, each window is fed through a fresh cache in chunks.
        chunk_tokens: tokens per chunk, with a cache.

    Returns:
        The mean over all bytes, and how many bytes and tokens it was taken over.

    Raises:
        ZooError: no text, or a context too short to predict anything.
    """
    import torch

    if context < 2 or chunk_tokens < 1:
        raise ZooError(
            f"context is 2 or more and chunk_tokens 1 or more (got {context}, {chunk_tokens})"
        )
    nats, num_bytes, num_tokens = 0.0, 0, 0
    with torch.inference_mode():
        for text in [texts] if isinstance(texts, str) else texts:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
            num_bytes += len(text.encode())
            num_tokens += len(ids)
            for start in range(0, len(ids), context - 1):
                window = [int(tokenizer.bos_token_id), *ids[start : start + context - 1]]
                nats += _window_nats(model, window, make_cache, chunk_tokens)
    if num_bytes == 0:
        raise ZooError("bits_per_byte needs some text (got none)")
    return BitsPerByte(nats / math.log(2) / num_bytes, num_bytes, num_tokens)


def _window_nats(
    model: PreTrainedModel, window: list[int], make_cache: MakeCache | None, chunk_tokens: int
) -> float:
    import torch

    ids = torch.tensor([window], device=model.device)  # [1, tokens]
    cache = None if make_cache is None else make_cache(model.config)
    size = ids.shape[1] if cache is None else chunk_tokens
    nats = 0.0
    for start in range(0, ids.shape[1] - 1, size):
        chunk = ids[:, start : min(start + size, ids.shape[1] - 1)]
        logits = model(input_ids=chunk, past_key_values=cache, use_cache=cache is not None).logits[
            0
        ]
        target = ids[0, start + 1 : start + 1 + chunk.shape[1]]
        nats += float(torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
    return nats
