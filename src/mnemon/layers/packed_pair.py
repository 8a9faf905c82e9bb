"""What packed layers share: appending to keys and values at once, and their state in files."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.formats import PackedSide, Scheme
from mnemon.layers.base import CacheLayer, LayerState
from mnemon.layers.packed_storage import PackedBuffer
from mnemon.layers.tokens import make_fit
from mnemon.schemes import PackedFormat

__all__ = ["append_pair", "dense_pair", "fill_pair", "new_pair", "pair_facts", "pair_tensors"]


def append_pair(
    layer: CacheLayer,
    keys: tuple[PackedBuffer, Tensor],
    values: tuple[PackedBuffer, Tensor],
    kept: int | None = None,
    num_visible: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Append to both buffers or, if anything is wrong, to none.

    Args:
        layer: whose buffers they are.
        keys: buffer and new keys.
        values: buffer and new values.
        kept: tokens that will be kept; None for all.
        num_visible: newest tokens to return; None for all.

    Raises:
        CacheError: shapes that do not fit, or numbers that are not finite.
    """
    (held_keys, new_keys), (held_values, new_values) = keys, values
    for new in (new_keys, new_values):
        # On an accelerator asking would stop the host at every token; packing asks there.
        if new.device.type == "cpu" and new.numel():
            if not math.isfinite(torch.linalg.vector_norm(new.detach(), math.inf)):
                raise CacheError(
                    "Keys or values hold numbers that are not finite (NaN or infinity), which a "
                    "packed format cannot store. This layer is unchanged; an attached model "
                    "(mnemon.attach) puts the layers before it back too, otherwise reset() the "
                    "cache and prefill again. Look for what makes them with the dense format."
                )
    same_length = new_values.shape[-2] == new_keys.shape[-2]
    if not (held_keys.fits(new_keys) and held_values.fits(new_values) and same_length):
        make_fit(layer, keys, values)
    pending = held_keys.prepare(new_keys, kept), held_values.prepare(new_values, kept)
    return (
        held_keys.commit(new_keys, pending[0], num_visible),
        held_values.commit(new_values, pending[1], num_visible),
    )


def pair_tensors(keys: PackedBuffer, values: PackedBuffer) -> dict[str, Tensor]:
    """What both hold, by name: dense tails "keys" and "values", and blocks beside them."""
    tensors = {}
    for name, buffer in (("keys", keys), ("values", values)):
        tail, side = buffer.tail_tokens(), buffer.side()
        if tail is not None:
            tensors[name] = tail
        if side is not None:
            tensors[f"{name}_blocks"] = side.blocks
            tensors[f"{name}_factors"] = side.factors
    return tensors


def dense_pair(keys: PackedBuffer, values: PackedBuffer) -> tuple[Tensor, Tensor]:
    """What both hold, dequantized, in the dtype of the tails."""
    tails = keys.tail_tokens(), values.tail_tokens()
    assert tails[0] is not None
    assert tails[1] is not None
    return (
        keys.numbers(0, len(keys), tails[0].dtype),
        values.numbers(0, len(values), tails[1].dtype),
    )


def pair_facts(keys: PackedBuffer, values: PackedBuffer) -> dict[str, Any]:
    """What else a reader of the tensors has to know."""
    sides = {"keys": keys.side(), "values": values.side()}
    return {
        "skipped": keys.num_skipped,
        "schemes": {
            name: None if side is None else side.scheme.facts() for name, side in sides.items()
        },
    }


def fill_pair(keys: PackedBuffer, values: PackedBuffer, state: LayerState) -> None:
    """Hold what `pair_tensors` and `pair_facts` said, or dense keys and values alone.

    Raises:
        CacheError: a state that contradicts itself, or another format; nothing changed.
    """
    tensors = state.tensors
    dense = {"keys", "values"}
    packed = {f"{name}_{part}" for name in dense for part in ("blocks", "factors")}
    if not tensors:
        keys.clear()
        values.clear()
        return
    if set(tensors) not in (dense, dense | packed):
        raise CacheError(f"A saved {state.kind} layer has tensors {sorted(tensors)}.")
    tails = tensors["keys"], tensors["values"]
    if any(tail.ndim != 4 or not tail.is_floating_point() for tail in tails) or (
        tails[0].shape[:-1] != tails[1].shape[:-1]
    ):
        raise CacheError(
            f"Saved keys {list(tails[0].shape)} and values {list(tails[1].shape)} do not belong "
            f"together."
        )
    sides = [
        _side(buffer, name, tensors, state.meta)
        for name, buffer in (("keys", keys), ("values", values))
    ]
    skipped = int(state.meta.get("skipped", 0)) if sides[0] is not None else 0
    counts = {0 if side is None else side.num_blocks for side in sides}
    if len(counts) > 1 or not 0 <= skipped < 64:
        raise CacheError(
            f"Saved keys and values of a {state.kind} layer have {sorted(counts)} blocks, and "
            f"{skipped} tokens of the first are skipped: the state contradicts itself."
        )
    for buffer, side, tail in zip((keys, values), sides, tails, strict=True):
        buffer.hold(side, skipped, tail)


def _side(
    buffer: PackedBuffer, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> PackedSide | None:
    if f"{name}_blocks" not in tensors:
        return None
    blocks, factors = tensors[f"{name}_blocks"], tensors[f"{name}_factors"]
    tail = tensors[name]
    scheme = Scheme(**meta["schemes"][name])
    if scheme != buffer.form.scheme(tail.shape[-1]):
        raise CacheError(
            f"The saved {name} are stored as {scheme}, this layer's would be as "
            f"{buffer.form.scheme(tail.shape[-1])}: another recipe, or another version's default. "
            f"Compute the cache again."
        )
    if blocks.shape[:2] != tail.shape[:2] or factors.dtype != torch.float32:
        raise CacheError(
            f"Saved blocks {list(blocks.shape)}, factors {factors.dtype} and a tail "
            f"{list(tail.shape)} of {name} do not belong together."
        )
    return PackedSide(
        blocks=blocks, factors=factors, scheme=scheme, width=tail.shape[-1],
        is_keys=buffer.is_keys,
    )  # fmt: skip


def new_pair(form: PackedFormat) -> tuple[PackedBuffer, PackedBuffer]:
    """Empty buffers for keys and for values."""
    return (
        PackedBuffer(form.keys, is_keys=True, residual=form.residual),
        PackedBuffer(form.values, is_keys=False, residual=form.residual),
    )
