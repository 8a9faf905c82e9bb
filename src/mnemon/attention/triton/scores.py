"""Device functions that the decode kernels share: what happens between product and softmax.

Scores are tiles ``[tokens, rows]``: a row is one query row of one query head of a group, row
``g * num_new + t`` for head ``g`` of the group and new token ``t``.
"""

import triton
import triton.language as tl

__all__ = ["finish_scores", "soft_cap", "softmax_step", "token_range"]


@triton.jit
def soft_cap(scores, softcap):
    """``tanh(scores / softcap) * softcap``, to the last digits of float32 near 0 too."""
    x = scores / softcap
    square = x * x
    series = 62.0 / 2835.0 * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = x + x * square * series
    size = tl.minimum(tl.abs(x), 16.0)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.25, near, far) * softcap


@triton.jit
def token_range(
    lengths, starts, batch, kv_head,
    lengths_b, lengths_h, starts_b, starts_h,
    num_tokens, num_new, window, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of this sequence and key head: the first token that any row may see, and the length."""
    length = num_tokens
    if lengths is not None:
        length = tl.load(lengths + batch * lengths_b + kv_head * lengths_h).to(tl.int32)
        length = tl.minimum(length, num_tokens)
    start = tl.zeros_like(length)
    if starts is not None:
        start = tl.load(starts + batch * starts_b + kv_head * starts_h).to(tl.int32)
    first = start
    if WINDOW:
        first = tl.maximum(first, length - num_new + 1 - window)
    return tl.maximum(first, 0), start, length


@triton.jit
def finish_scores(
    scores, tokens, rows, batch, kv_head, start, length,
    mask, mask_b, mask_h, mask_n, mask_t,
    bias, bias_b, bias_h, bias_n, bias_t,
    softcap, window, num_rows, num_new,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Cap, bias and masks on scaled scores ``[tokens, rows]``; -inf where nothing is seen.

    ``tokens`` counts as masks do; a query row ``t`` stands at ``length - num_new + t``.
    """
    if SOFTCAP:
        scores = soft_cap(scores, softcap)
    row_new = rows % num_new
    seen = ((tokens >= start) & (tokens < length))[:, None] & (rows < num_rows)[None, :]
    last = length - num_new + row_new
    if CAUSAL:
        seen = seen & (tokens[:, None] <= last[None, :])
    if WINDOW:
        seen = seen & (tokens[:, None] > (last - window)[None, :])
    if (bias is not None) or (mask is not None):
        head = (kv_head * (num_rows // num_new) + rows // num_new).to(tl.int64)
    if bias is not None:
        place = bias + batch.to(tl.int64) * bias_b + head * bias_h + row_new * bias_n
        place = place[None, :] + tokens.to(tl.int64)[:, None] * bias_t
        scores += tl.load(place, mask=seen, other=0.0).to(tl.float32)
    if mask is not None:
        place = mask + batch.to(tl.int64) * mask_b + head * mask_h + row_new * mask_n
        place = place[None, :] + tokens.to(tl.int64)[:, None] * mask_t
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (tl.load(place, mask=seen, other=0) != 0)
        else:
            scores += tl.load(place, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def softmax_step(scores, top, total):
    """One step of the running softmax: weights, the new top and total, the factor on the old.

    The total is kept per token of a tile ``[tokens, rows]`` and summed once, at the end.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=0))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp(scores - base[None, :])
    shrink = tl.exp(top - base)
    return weights, new_top, total * shrink[None, :] + weights, shrink
