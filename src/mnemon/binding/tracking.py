"""Which tokens a forward put into a cache, and a cache that stays whole when a forward breaks."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from transformers import PreTrainedModel

from mnemon.binding.prefix import UNKNOWN
from mnemon.cache import Cache
from mnemon.hf import generate as hf
from mnemon.hf.fingerprint import fingerprint
from mnemon.layers import CacheLayer, HybridLayer

__all__ = [
    "ATTACHED",
    "brings_cache",
    "is_attached",
    "is_of_another_model",
    "own_cache",
    "run_forward",
]

#: The instance attribute under which an attached model keeps its attachment.
ATTACHED: Final = "_mnemon_attachment"


def is_attached(model: torch.nn.Module) -> bool:
    return ATTACHED in vars(model)


def is_of_another_model(cache: Cache, model: PreTrainedModel) -> bool:
    """Whether a model that computes otherwise filled `cache`.

    One that is gone counts as such, and so does `model` itself once its weights were written to
    (training, merged adapters).
    """
    if cache.filled_by is None:  # nobody knows: filled by hand
        return False
    other = cache.filled_by()
    if other is model:
        return cache.filled_version not in (None, weights_version(model))
    return other is None or bool(fingerprint(other).differences(fingerprint(model)))


def weights_version(model: PreTrainedModel) -> int | None:
    """How often the weights were written in place, summed; None where torch does not count."""
    try:
        return sum(parameter._version for parameter in model.parameters())
    except RuntimeError:  # made under inference mode
        return None


def _note_model(cache: Cache, model: PreTrainedModel, start: int) -> None:
    """Write down that `model` filled `cache` from token `start` on."""
    holder = None if cache.filled_by is None else cache.filled_by()
    if start == 0:
        cache.filled_by, cache.filled_version = weakref.ref(model), weights_version(model)
    elif holder is not model:
        if is_of_another_model(cache, model):
            # Two models in one cache: it counts as filled by one that is gone.
            cache.filled_by = cast("weakref.ref[PreTrainedModel]", weakref.ref(_Mixture()))
        elif cache.filled_by is None or holder is not None:
            cache.filled_by, cache.filled_version = weakref.ref(model), None


class _Mixture:
    """What filled a cache that two models filled; nobody keeps one alive."""


def brings_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has a mnemon cache among its arguments: the cheap question first."""
    return own_cache(kwargs) is not None or any(isinstance(value, Cache) for value in args)


def own_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The mnemon cache among a call's arguments, if it brings one."""
    for name in hf.CACHE_NAMES:
        # Compared with None, not tested for truth: a cache without layers has length 0.
        cache = arguments.get(name)
        if isinstance(cache, Cache):
            return cache
    return None


def run_forward(
    model: PreTrainedModel,
    names: hf.Stream,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    cache: Cache,
    prompt_mask: torch.Tensor | None = None,
) -> Any:
    """``forward(**arguments)``, with the tokens it caches written into the cache's log.

    If it raises midway (out of memory, Ctrl-C), the cache is put back as it was before; where that
    is impossible (a window or a state has already let go of its past) it is emptied, and the
    exception carries a note that says so.

    Args:
        names: what `model` calls its arguments.
        prompt_mask: ``[batch, tokens]``, for calls whose own mask is not per token.
    """
    start = cache.num_tokens
    try:
        outputs = forward(**arguments)
    except BaseException as error:
        _mend(cache, start, error)
        raise
    ids, embeds = arguments.get(names.ids), arguments.get(names.embeds)
    if ids is None and embeds is not None:
        ids = torch.full(embeds.shape[:2], UNKNOWN, dtype=torch.int64)
    _note_model(cache, model, start)
    if ids is not None and ids.ndim == 2:
        mask = _mask_of_new(arguments.get(names.mask), prompt_mask, start, ids)
        cache.record_tokens(ids, mask, start)
    return outputs


def _mask_of_new(
    mask: object, prompt_mask: torch.Tensor | None, start: int, ids: torch.Tensor
) -> torch.Tensor | None:
    """``[batch, new]`` of what was just cached; None if nothing is padded."""
    num_new = ids.shape[1]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask[:, -num_new:] if mask.shape[1] >= num_new else None
    if mask is None or prompt_mask is None or start >= prompt_mask.shape[1]:
        return None
    known = prompt_mask[:, start : start + num_new]
    missing = num_new - known.shape[1]
    known = torch.nn.functional.pad(known, (0, missing), value=1) if missing else known
    repeats = ids.shape[0] // known.shape[0]
    return known.repeat_interleave(repeats, dim=0) if repeats > 1 else known


def _mend(cache: Cache, start: int, error: BaseException) -> None:
    layers = [part for layer in _self_attention(cache) for part in _parts(layer)]
    # A state cannot say whether the broken forward reached it: counted as not undoable.
    excess = [layer.num_tokens - start if layer.counts_tokens else -1 for layer in layers]
    undoable = all(
        0 <= extra and layer.can_crop(extra) for layer, extra in zip(layers, excess, strict=True)
    )
    if start and undoable:
        for layer, extra in zip(layers, excess, strict=True):
            layer.crop(extra)
        return
    cache.reset()
    if start:
        error.add_note(
            f"mnemon: this interrupted forward left the layers of the cache with different "
            f"lengths, and the {start} tokens it held before cannot be restored (a window or a "
            f"state has let go of its past). The cache is now empty: pass the whole prompt again."
        )


def _self_attention(cache: Cache) -> Sequence[CacheLayer]:
    # Of an encoder-decoder pair, `layers` are the decoder's own.
    return [layer for layer in cache.layers if not layer.is_dummy]


def _parts(layer: CacheLayer) -> tuple[CacheLayer, ...]:
    return layer.parts if isinstance(layer, HybridLayer) else (layer,)
