"""How much a model compresses, by layer and head, and setting that to a ratio."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mnemon.compression import CONFIG_NAME, Compression
from mnemon.errors import LearnedMemoryError
from mnemon.hf.kinds import decoder_config
from mnemon.memory.retrofitting.attaching import control_of
from mnemon.memory.retrofitting.control import Control

__all__ = ["Measured", "calibrate", "measure", "stored_tokens"]


class Measured(NamedTuple):
    """What is kept of rows of tokens.

    Attributes:
        ratio: tokens seen per slot kept, over all layers and heads.
        by_head: the same for each [layer][kv head].
        num_tokens: tokens seen.
    """

    ratio: float
    by_head: tuple[tuple[float, ...], ...]
    num_tokens: int


def stored_tokens(compression: Compression, decisions: Tensor) -> Tensor:
    """Slots that a cache holds after rows of tokens, [batch, kv_heads].

    Args:
        compression: how the cache is compressed.
        decisions: 0 or 1 of every token, [batch, kv_heads, tokens].
    """
    num_tokens = decisions.shape[-1]
    if compression.method == "dmc":
        return num_tokens - decisions.sum(-1)
    # The token after it marks a token, which goes when its window has passed.
    last = max(0, num_tokens - compression.window)
    return num_tokens - decisions[..., 1 : last + 1].sum(-1)


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Sequence[Tensor]) -> Measured:
    """What `model` would keep of each of `rows`, by its decisions as they are in use.

    Args:
        model: from `attach_compression`, `load_retrofitted` or `retrofit`.
        rows: ids, each [batch, tokens].

    Raises:
        LearnedMemoryError: the model does not compress, or there is nothing to measure with.
    """
    control = _control(model)
    if not rows:
        raise LearnedMemoryError("Nothing to measure with: give rows of token ids.")
    stored: Tensor | None = None
    num_tokens = 0
    with _recording(control):
        for ids in rows:
            model(input_ids=ids.to(model.device), use_cache=False)
            kept = torch.stack(
                [
                    stored_tokens(control.compression, control.records[layer]).double().sum(0)
                    for layer in sorted(control.records)
                ]
            )
            stored = kept if stored is None else stored + kept
            num_tokens += ids.numel()
    assert stored is not None
    ratios = (num_tokens / stored.clamp(min=1)).tolist()
    whole = num_tokens * stored.numel() / float(stored.sum())
    return Measured(whole, tuple(map(tuple, ratios)), num_tokens)


def calibrate(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    ratio: float,
    *,
    tolerance: float = 0.02,
    rounds: int = 8,
) -> Measured:
    """Shift the decisions' offset until `model` compresses `rows` by `ratio`.

    Training counts noisy decisions; those in use have no noise, and their share may differ.

    Args:
        model: as for `measure`; its compression, and what its config says of it, are replaced.
        rows: ids, each [batch, tokens], none that is judged by later.
        ratio: wanted.
        tolerance: relative; the found ratio lies between `ratio` and so much more, if it can.
        rounds: of measuring, at most.

    Returns:
        What is measured with the offset found.

    Raises:
        LearnedMemoryError: as `measure`.
    """
    control = _control(model)
    tried = {control.compression.offset: measure(model, rows)}
    for _ in range(rounds):
        offset, found = _nearest(tried, ratio)
        if ratio <= found.ratio <= ratio * (1 + tolerance):
            break
        offset = _next_offset(tried, ratio * (1 + tolerance / 2))
        if offset in tried:
            break
        _set_offset(model, control, offset)
        tried[offset] = measure(model, rows)
    offset, found = _nearest(tried, ratio)
    _set_offset(model, control, offset)
    return found


def _next_offset(tried: dict[float, Measured], ratio: float) -> float:
    """Between the two offsets around the ratio, or beyond the last one."""
    below = [offset for offset, found in tried.items() if found.ratio < ratio]
    above = [offset for offset, found in tried.items() if found.ratio >= ratio]
    if not above:
        return max(below) + 0.25 * 2.0 ** len(below)
    if not below:
        return min(above) - 0.25 * 2.0 ** len(above)
    low: float = max(below)
    high: float = min(above)
    gap = tried[high].ratio - tried[low].ratio
    share = (ratio - tried[low].ratio) / gap if gap > 0 else 0.5
    # Not too near an end: the curve has steps.
    return low + (high - low) * min(0.85, max(0.15, share))


def _nearest(tried: dict[float, Measured], ratio: float) -> tuple[float, Measured]:
    return min(tried.items(), key=lambda one: _distance(one[1].ratio, ratio))


def _distance(found: float, ratio: float) -> float:
    """Too little compression counts more than too much."""
    return (found - ratio) / ratio if found >= ratio else 4 * (ratio - found) / ratio


def _set_offset(model: PreTrainedModel, control: Control, offset: float) -> None:
    set_compression(model, control, replace(control.compression, offset=offset))


def set_compression(model: PreTrainedModel, control: Control, compression: Compression) -> None:
    """Replace how `model` compresses, in its layers' settings and in what its config says."""
    control.compression = compression
    for config in {id(c): c for c in (model.config, decoder_config(model.config))}.values():
        setattr(config, CONFIG_NAME, compression.to_dict())


def _control(model: PreTrainedModel) -> Control:
    control = control_of(model)
    if control is None:
        raise LearnedMemoryError(
            f"{type(model).__name__} does not compress its cache; expected a model from "
            f"mnemon.memory.retrofit, load_retrofitted or attach_compression."
        )
    return control


@contextmanager
def _recording(control: Control) -> Iterator[None]:
    before = control.relaxed, control.recording
    control.relaxed, control.recording = False, True
    control.records.clear()
    try:
        yield
    finally:
        control.relaxed, control.recording = before
        control.records.clear()
