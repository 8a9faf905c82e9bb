"""Rows to retrofit with: the bundled model's own mixture, or anybody's text or tokens.

What a step gets depends on the seed and the step alone, so that a run that goes on after an
interruption sees the same rows.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mnemon.errors import LearnedMemoryError
from mnemon.memory.retrofitting.options import RetrofitOptions

__all__ = ["Batch", "Data", "Rows", "bundled_rows", "bundled_text", "rows_of"]

_SHARES = (0.20, 0.30, 0.50)  # of chunks, needles and text
_LENGTHS = {4: 0.30, 2: 0.45, 1: 0.25}  # share of steps whose rows are cut in so many


class Batch(NamedTuple):
    """Rows of one step.

    Attributes:
        ids: [rows, tokens].
        weight: of the prediction made at each token, [rows, tokens]; None: all the same.
    """

    ids: Tensor
    weight: Tensor | None = None


Rows = Callable[[int], Batch]
Data = Iterable[str] | Iterable[Tensor] | Callable[[int], "Tensor | Batch"]


def bundled_rows(tokenizer: PreTrainedTokenizerBase, options: RetrofitOptions) -> Rows:
    """The bundled model's mixture: its text, and recall tasks over all distances of a row.

    Some steps have rows of a quarter or half of `length`, and as many more rows.

    Args:
        tokenizer: the bundled model's, or one of its vocabulary.
        options: of the retrofit.
    """
    from mnemon.zoo import tasks
    from mnemon.zoo.prepare import task_vocabulary

    vocabulary, text = task_vocabulary(tokenizer), bundled_text(tokenizer, options.seed)
    lengths = [max(16, options.length // part) for part in _LENGTHS]

    def rows(step: int) -> Batch:
        rng = np.random.default_rng([options.seed, step, 11])
        length = int(rng.choice(lengths, p=list(_LENGTHS.values())))
        made, _ = tasks.make_rows(
            seed=options.seed + 1_000_003,  # none that the model was trained with
            step=step,
            num_rows=max(1, options.batch * options.length // length),
            length=length,
            vocabulary=vocabulary,
            text=text,
            shares=_SHARES,
        )
        weight = np.zeros_like(made.weight)
        weight[:, :-1] = made.weight[:, 1:]  # of the token that predicts
        return Batch(torch.from_numpy(made.ids), torch.from_numpy(weight))

    return rows


def rows_of(
    data: Data, tokenizer: PreTrainedTokenizerBase | None, options: RetrofitOptions
) -> Rows:
    """Rows of what a caller gave.

    Args:
        data: a function of the step that gives ids ``[rows, tokens]`` or a `Batch`; or an iterable
            of texts or of ids. Texts, and ids of one axis, are joined and cut at random places;
            ids of two axes are batches, taken in their order, again from the first at the end.
        tokenizer: for texts.
        options: of the retrofit.

    Raises:
        LearnedMemoryError: nothing to train on, or something else.
    """
    if callable(data):
        function = data
        return lambda step: _checked(function(step))
    if isinstance(data, str | Tensor):
        raise LearnedMemoryError(
            f"data of a retrofit is an iterable of texts or token ids, or a function of the step; "
            f"got one {type(data).__name__}: put it in a list."
        )
    items = _taken(data, options)
    if not items:
        raise LearnedMemoryError("data of a retrofit is empty: give some texts or token ids.")
    if all(isinstance(item, Tensor) and item.dim() == 2 for item in items):
        batches = [_checked(item) for item in items]
        return lambda step: batches[step % len(batches)]
    stream = np.concatenate([_as_ids(item, tokenizer) for item in items])
    if len(stream) < options.length + 1:
        raise LearnedMemoryError(
            f"data of a retrofit has {len(stream)} tokens, a row {options.length}: give more "
            f"text, or a smaller length."
        )

    def rows(step: int) -> Batch:
        rng = np.random.default_rng([options.seed, step, 13])
        starts = rng.integers(0, len(stream) - options.length + 1, options.batch)
        return Batch(torch.from_numpy(np.stack([stream[s : s + options.length] for s in starts])))

    return rows


def _taken(data: Iterable[Any], options: RetrofitOptions) -> list[Any]:
    """As many items as a run can use; an endless iterable is left in its middle."""
    items: list[Any] = []
    left = 4 * options.steps * options.batch * options.length
    for item in data:
        items.append(item)
        left -= item.numel() if isinstance(item, Tensor) else len(item) // 8 + 1
        if left <= 0:
            break
    return items


def _as_ids(item: Any, tokenizer: PreTrainedTokenizerBase | None) -> NDArray[np.int64]:
    if isinstance(item, str):
        if tokenizer is None:
            raise LearnedMemoryError(
                "data of a retrofit has texts: pass the model's tokenizer too, or token ids."
            )
        return np.asarray(_encoded(tokenizer, item), dtype=np.int64)
    if isinstance(item, Tensor) and item.dim() == 1 and not item.is_floating_point():
        return item.cpu().numpy().astype(np.int64)
    kind = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
    raise LearnedMemoryError(
        f"data of a retrofit holds {kind}; expected texts, whole numbers of one axis, or all of "
        f"two axes [rows, tokens]."
    )


def _checked(found: Any) -> Batch:
    batch = found if isinstance(found, Batch) else Batch(found)
    ids = batch.ids
    if (
        not isinstance(ids, Tensor)
        or ids.dim() != 2
        or ids.is_floating_point()
        or (ids.shape[1] < 2 or not ids.shape[0])
    ):
        came = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise LearnedMemoryError(
            f"A step of a retrofit got {came}; expected token ids [rows, tokens], whole numbers, "
            f"of two tokens or more."
        )
    if batch.weight is not None and batch.weight.shape != ids.shape:
        raise LearnedMemoryError(
            f"Weights of a retrofit are {tuple(batch.weight.shape)}; expected those of the ids, "
            f"{tuple(ids.shape)}."
        )
    return Batch(ids.long(), batch.weight)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def bundled_text(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> NDArray[np.int64]:
    """The bundled model's training documents in an order of the seed, each opened by its mark."""
    from mnemon.zoo import corpus

    documents, _ = corpus.split(corpus.load_documents())
    ids: list[int] = []
    for index in np.random.default_rng([seed, 7]).permutation(len(documents)):
        ids += [int(tokenizer.bos_token_id), *_encoded(tokenizer, documents[index].text)]
    return np.asarray(ids, dtype=np.int64)
