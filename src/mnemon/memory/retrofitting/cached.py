"""Attention of a retrofitted module through its cache layer: prompts in pieces, then single tokens.

A piece sees the slots that were there before it, and itself under the mask that training used; it
is stored afterwards. A single token is stored first and then sees every live slot.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from mnemon.attention import cpu
from mnemon.attention.dispatch import attend
from mnemon.attention.parts import attend_part, merge_parts
from mnemon.errors import LearnedMemoryError
from mnemon.hf import compressing as hf
from mnemon.layers.compressing import Call, CompressingLayer, Past
from mnemon.layers.dmc import DMCLayer
from mnemon.layers.frozen_slots import FrozenPart
from mnemon.memory.retrofitting.control import Control
from mnemon.memory.retrofitting.parallel import drop_scores, pool, shift_left
from mnemon.memory.retrofitting.parts import Decided, first_tokens, place, valid_tokens

__all__ = ["attend_cached"]

_PIECE_TOKENS = 256
_PIECE_SCORES = 1 << 24  # numbers of a piece's mask, at most


def attend_cached(
    module: nn.Module,
    control: Control,
    layer: CompressingLayer,
    decided: Decided,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """What the queries of one call read, [batch, heads, new, head_dim]; the call is stored.

    No gradient flows: a backward pass through it raises `LearnedMemoryError`.
    """
    tracked = torch.is_grad_enabled() and decided.query.requires_grad
    with torch.no_grad():
        out = _attend(module, control, layer, decided, position_embeddings, mask)
    if not tracked:
        return out
    passed: Tensor = _NoGradient.apply(out, decided.query)  # type: ignore[no-untyped-call]
    return passed


def _attend(
    module: nn.Module,
    control: Control,
    layer: CompressingLayer,
    decided: Decided,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    compression, logits = control.compression, decided.logits
    num_new = logits.shape[-1]
    if mask is not None and layer.sliding is None and not module.layer_idx:
        _check_past(layer, mask, num_new)
    # Padding is on the left: once every row has begun, a single token is never padding.
    begun = layer.num_tokens > 0 and layer.unstarted() is None
    valid = None if num_new == 1 and begun else valid_tokens(hf.as_seen(mask), num_new)
    decisions = logits > 0
    if not begun:
        first = first_tokens(valid, logits)
        rows = layer.unstarted()
        decisions = decisions & ~(first if rows is None else first & rows[:, None, None])
    control.record(int(module.layer_idx), decisions.to(logits.dtype))  # type: ignore[arg-type]
    keys, values, raw = decided.keys, decided.values, None
    if isinstance(layer, DMCLayer):
        keys, values, raw = _pooled(layer, decided, decisions, valid)
    query, keys = place(module, compression, decided.query, keys, position_embeddings)
    call = Call(keys, values.to(query.dtype), decisions, valid, raw)
    scale = float(module.scaling)  # type: ignore[arg-type]
    if num_new == 1 and valid is None:
        layer.store(call)
        return _attend_one(layer, query, scale)
    window = 0 if compression.method == "dmc" else compression.window
    outs, start = [], 0
    while start < num_new:
        room = _PIECE_SCORES // max(1, query.shape[0] * query.shape[1] * (start + _PIECE_TOKENS))
        stop = min(num_new, start + max(32, min(_PIECE_TOKENS, room)))
        piece = _cut(call, start, stop)
        outs.append(_attend_piece(layer, query[:, :, start:stop], piece, window, scale))
        layer.store(piece)
        start = stop
    return torch.cat(outs, dim=2)


def _check_past(layer: CompressingLayer, mask: Tensor, num_new: int) -> None:
    """Raise `LearnedMemoryError` if `mask` hides tokens that are stored, or shows padding."""
    seen = hf.as_seen(mask)
    assert seen is not None
    past = seen[:, 0, -1, : seen.shape[-1] - num_new].sum(-1)
    counts = layer.counts
    if counts.numel() and past.numel() and not bool((past == counts).all()):
        row = int((past != counts).nonzero()[0])
        raise LearnedMemoryError(
            f"The attention mask shows {int(past[row])} of the cached tokens of row {row}, and "
            f"{int(counts[row])} were no padding when they were cached: a compressed cache cannot "
            f"hide or show them later. Pass the attention_mask that goes on from the earlier one "
            f"(generate makes one up where a prompt contains pad_token_id)."
        )


def _cut(call: Call, start: int, stop: int) -> Call:
    parts = (call.keys, call.values, call.decisions)
    keys, values, decisions = (part[:, :, start:stop] for part in parts)
    valid = None if call.valid is None else call.valid[:, start:stop]
    if valid is not None and bool(valid.all()):
        valid = None
    raw = None if call.raw is None else call.raw[:, :, start:stop]
    return Call(keys, values, decisions, valid, raw)


def _pooled(
    layer: DMCLayer, decided: Decided, merged: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """DMC: the means of segments that may begin before this call, and the raw numbers of it."""
    weights = decided.weights
    assert weights is not None
    dtype = weights.dtype
    if valid is not None:
        weights = weights * valid[:, None]
    num_new, key_width = decided.keys.shape[2], decided.keys.shape[3]
    beside = torch.stack([weights, merged.to(dtype)], dim=-1)
    raw = torch.cat([decided.keys.to(dtype), decided.values.to(dtype), beside], dim=-1)
    whole = raw
    if layer.carry.numel():
        if layer.carry.shape[0] != raw.shape[0] and layer.batch_size == 1:
            layer.repeat(raw.shape[0])
        whole = torch.cat([layer.carry.to(dtype), raw], dim=2)
    pair, weights, joined = whole[..., :-2], whole[..., -2], whole[..., -1]
    if num_new == 1:
        means = _newest_mean(pair, weights, joined)
    else:
        means = pool(pair, weights, joined, layer.window)[:, :, -num_new:]
    return means[..., :key_width], means[..., key_width:], raw


def _newest_mean(x: Tensor, weights: Tensor, merged: Tensor) -> Tensor:
    """`pool` for the newest token alone, [batch, kv_heads, 1, width]."""
    newest = x[:, :, -1:]
    reach = merged[..., 1:].flip(-1).cumprod(-1).flip(-1)
    share = reach * weights[..., :-1]
    total = (share.sum(-1) + weights[..., -1]).clamp(min=torch.finfo(weights.dtype).tiny)
    pulled = share[..., None, :] @ (x[:, :, :-1] - newest)
    return newest + pulled / total[..., None, None]


def _attend_one(layer: CompressingLayer, query: Tensor, scale: float) -> Tensor:
    """One query over all live slots, its own among them."""
    slots = layer.slots
    keys, values = (part[:, :, : slots.bound] for part in slots.parts[:2])
    seen = layer.visible()
    has_frozen = layer.frozen is not None and not layer.frozen.is_empty
    if query.device.type == "cpu" and seen is None and cpu.serves(query, keys, values):
        if not has_frozen:
            return cpu.decode(query, keys, values, scale=scale, lengths=slots.lengths)
        newest = FrozenPart(keys, values, slots.lengths)
        outs, lses = [], []
        for part in chain(layer.frozen_past(), [newest]):
            out, lse = cpu.decode_part(
                query, part.keys, part.values, scale=scale, lengths=part.lengths
            )
            outs.append(out)
            lses.append(lse)
        return merge_parts(outs, lses).to(query.dtype)
    live = slots.live() if seen is None else seen
    longest = live.shape[-1]
    dense = Past(keys[:, :, :longest], values[:, :, :longest], live[:, :, None])
    return _attend_parts(query, layer, [dense], scale)


def _attend_piece(
    layer: CompressingLayer, query: Tensor, call: Call, window: int, scale: float
) -> Tensor:
    """The queries of a piece over the slots before it and over the piece itself."""
    num_new = call.keys.shape[2]
    past = layer.past(call)
    plain = call.valid is None and layer.sliding is None and not bool(call.decisions.any())
    if not past and plain:
        return attend(query, call.keys, call.values, scale=scale, causal=True)
    kept = torch.zeros(call.decisions.shape, dtype=query.dtype, device=query.device)
    kept = kept.masked_fill(shift_left(call.decisions), -torch.inf)
    seen = drop_scores(kept, window, num_new, layer.sliding) == 0
    if call.valid is not None:
        seen = seen & call.valid[:, None, None]
    return _attend_parts(query, layer, [*past, Past(call.keys, call.values, seen)], scale)


def _attend_parts(
    query: Tensor, layer: CompressingLayer, parts: Sequence[Past], scale: float
) -> Tensor:
    """The frozen slots and several parts of the others, each under its own mask."""
    group = query.shape[1] // parts[0].keys.shape[1]
    whole = (Past(part.keys, part.values, part.live()[:, :, None]) for part in layer.frozen_past())
    if query.dtype == torch.float64:
        # What is merged is float32. A stream's part is gone with the next one: keep copies.
        frozen = [Past(part.keys.clone(), part.values.clone(), part.seen) for part in whole]
        return _attend_together(query, [*frozen, *parts], scale)
    outs, lses = [], []
    for keys, values, seen in chain(whole, parts):
        mask = seen.repeat_interleave(group, dim=1)
        out, lse = attend_part(query, keys, values, mask=mask, scale=scale)
        outs.append(out)
        lses.append(lse)
    return merge_parts(outs, lses).to(query.dtype)


def _attend_together(query: Tensor, parts: Sequence[Past], scale: float) -> Tensor:
    """All parts in one call: parts that are merged are float32."""
    batch, num_heads, num_new, _ = query.shape
    heads = parts[0].keys.shape[1]
    keys, values = parts[0].keys, parts[0].values
    if len(parts) > 1:
        keys = torch.cat([part.keys for part in parts], dim=2)
        values = torch.cat([part.values for part in parts], dim=2)
    masks = [part.seen.expand(batch, heads, num_new, part.keys.shape[2]) for part in parts]
    mask = torch.cat(masks, dim=-1).repeat_interleave(num_heads // heads, dim=1)
    return attend(query, keys, values, mask=mask, scale=scale).nan_to_num(0.0)


@final
class _NoGradient(torch.autograd.Function):
    """Passes numbers on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise LearnedMemoryError(
            "No gradient flows through a compressed cache: train without one (use_cache=False), "
            "and evaluate under torch.no_grad()."
        )
