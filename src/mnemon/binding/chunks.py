"""Prefill in fixed chunks aligned to absolute positions: the arithmetic does not depend on reuse.

tokens   0      256      512      768   900
one shot |---A---|---B---|---C---|--D--|
reuse    |==cached=======|.......         crop to 512, then run C and D again: the same bits
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal

import torch
from transformers import PreTrainedModel

from mnemon.binding import prefix
from mnemon.binding.states import continues_states
from mnemon.binding.tracking import is_attached, is_of_another_model, run_forward
from mnemon.cache import Cache, Prefilled
from mnemon.errors import CacheError, ModelError
from mnemon.hf import generate as hf

__all__ = ["DEFAULT_CHUNK", "Progress", "checked_chunk", "prefill", "reusable", "run"]

DEFAULT_CHUNK: Final = 256

Progress = Callable[[int, int], None]


def prefill(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    chunk: int = DEFAULT_CHUNK,
    progress: Progress | Literal[True] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Any:
    """Fill `cache` with `ids`, reusing what it holds, such that reuse changes no bit.

    The tokens run in chunks that begin at multiples of `chunk`. Of a filled cache, the leading
    tokens are reused that equal `ids` and that an earlier prefill of the same model computed in the
    same chunks, with the same batch, dtype and attention implementation; the rest is computed
    again. So the logits and the cache are bit for bit those of a prefill into an empty cache. A
    cache that cannot be cropped to a chunk's beginning (windows that moved on, recurrent states) is
    emptied first. A model that cannot go on from its recurrent state with several tokens (see
    `continues_states`) is fed the whole prompt at once.

    Works with and without `attach`. Decoder-only models.

    Args:
        model: a transformers model.
        ids: int64 ``[batch, tokens]``, at least one token; padding on the left.
        cache: filled up to ``ids.shape[1]`` tokens on return.
        chunk: tokens per chunk, a power of two.
        progress: True for a progress bar on a terminal, or called with (tokens done, tokens).
        attention_mask: ``[batch, tokens]``, 0 where padded; None for no padding.

    Returns:
        The model's outputs of the last chunk; `logits` is ``[batch, 1, vocab]``, those of the last
        token. Runs without gradients.

    Raises:
        CacheError: not a mnemon cache, or shapes that do not fit.
        ModelError: a model with an encoder, or a chunk that is no power of two.
    """
    chunk = checked_chunk(chunk)
    _check(model, ids, cache, attention_mask)
    num_tokens = ids.shape[1]
    mask = attention_mask
    if mask is not None and bool((mask == 1).all()):
        mask = None
    keep = 0
    in_pieces = num_tokens <= chunk or continues_states(model, cache)
    if cache.num_tokens and in_pieces and not is_of_another_model(cache, model):
        agreed = prefix.match(cache.tokens, prefix.marked(ids, mask), grouped=True).num_common
        keep = min(agreed, num_tokens - 1, reusable(model, cache, ids.shape[0], chunk))
        keep = keep // chunk * chunk
        remove = cache.num_tokens - keep
        keep = keep if cache.can_crop(remove) else 0
        if keep:
            cache.crop(-remove)
    if not keep:
        cache.reset()
    with _progress(progress) as report:
        size = chunk if in_pieces else num_tokens
        return run(model, ids, cache, mask, keep, num_tokens, size, report)


def run(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    mask: torch.Tensor | None,
    start: int,
    stop: int,
    chunk: int,
    report: Progress | None = None,
) -> Any:
    """Compute tokens ``[start, stop)`` of `ids` in chunks; `cache` holds `start` of them.

    Returns:
        The outputs of the last chunk, logits of its last token only.
    """
    tracked = is_attached(model)
    aligned = start == 0 or start == reusable(model, cache, ids.shape[0], chunk)
    names, arithmetic = hf.stream(model), _arithmetic(model)
    # A chunk before the first padding runs without a mask, whatever follows: the same bits.
    padded = [] if mask is None else (mask == 0).any(dim=0).nonzero().flatten().tolist()
    first_padded = padded[0] if padded else stop
    outputs = None
    with torch.no_grad():
        padding = torch.ones_like(ids) if mask is None else mask
        positions = hf.position_ids(model, ids, padding)
        begin = start
        while begin < stop:
            end = min((begin // chunk + 1) * chunk, stop)
            shown = mask if first_padded < end else None
            inputs = hf.forward_inputs(model, cache, ids, shown, positions, begin, end)
            if tracked:
                outputs = model(**inputs)
            else:
                outputs = run_forward(model, names, model, inputs, cache, mask)
            if aligned and end % chunk == 0 and begin % chunk == 0:
                cache.prefilled = Prefilled(
                    chunk=chunk,
                    num_tokens=end,
                    batch_size=ids.shape[0],
                    arithmetic=arithmetic,
                )
            begin = end
            if report is not None:
                report(end, stop)
    if outputs is not None and getattr(outputs, "logits", None) is not None:
        outputs.logits = outputs.logits[:, -1:]
    return outputs


def reusable(model: PreTrainedModel, cache: Cache, batch_size: int, chunk: int) -> int:
    """Leading tokens of `cache` that were computed in chunks of `chunk`, as they would be now."""
    done = cache.prefilled
    if done is None or not (done.batch_size == batch_size == cache.batch_size):
        return 0
    if done.chunk != chunk or done.arithmetic != _arithmetic(model):
        return 0
    return min(done.num_tokens, cache.num_tokens) // chunk * chunk


def checked_chunk(chunk: int) -> int:
    """`chunk`, if it is a power of two.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1):
        raise ModelError(f"chunk is a power of two (64, 128, 256, ...); got {chunk!r}.")
    return chunk


def _arithmetic(model: PreTrainedModel) -> str:
    """All that rounding depends on besides numbers and shapes, as far as it can be known."""
    configs = (vars(module).get("config") for module in model.modules())
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs if config}
    device = model.device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"{device.type} {capability} {torch.get_num_threads()} threads"
    return f"{'+'.join(sorted(names))} in {model.dtype} on {where}, torch {torch.__version__}"


def _check(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None
) -> None:
    if not isinstance(cache, Cache):
        raise CacheError(
            f"prefill fills a mnemon.Cache; got {type(cache).__name__}. Use "
            f"mnemon.Cache(model.config)."
        )
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"prefill is for decoder-only models; {type(model).__name__} has an encoder. Pass the "
            f"cache to generate instead."
        )
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise CacheError(f"prefill takes ids [batch, tokens], not empty; got {tuple(ids.shape)}.")
    if mask is not None and mask.shape != ids.shape:
        raise CacheError(
            f"The attention mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}; they "
            f"must be alike."
        )


def _progress(
    progress: Progress | Literal[True] | None,
) -> AbstractContextManager[Progress | None]:
    if progress is True:
        return _bar()
    return nullcontext(progress)


@contextmanager
def _bar() -> Any:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    with RichProgress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("prefill", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
