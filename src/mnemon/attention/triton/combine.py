"""The splits of a row as one output: a fixed order, whatever the length and the batch."""

import triton
import triton.language as tl

__all__ = ["combine_splits"]


@triton.jit(do_not_specialize=["num_splits", "num_rows", "num_new"])
def combine_splits(
    partial, tops, totals, sinks, out, lse, num_splits, num_rows, num_new,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """``out`` is ``[batch, kv_heads, rows, value_dim]``, which is ``[batch, heads, new, ..]``.

    An empty split has top -inf and leaves every bit as it is, so a sequence comes out the same
    alone and beside a longer one.
    """
    row, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = batch.to(tl.int64) * tl.num_programs(1) + kv_head
    line = pair * num_rows + row
    dims = tl.arange(0, BLOCK_V)
    top = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sink = tl.full((1,), -float("inf"), tl.float32)
    if sinks is not None:
        group = num_rows // num_new
        head = kv_head * group + row // num_new
        sink = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32)
        top = tl.maximum(top, sink)
    result = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)
        held = splits < num_splits
        part_top = tl.load(tops + line * num_splits + splits, mask=held, other=-float("inf"))
        part_total = tl.load(totals + line * num_splits + splits, mask=held, other=0.0)
        used = part_top > -float("inf")
        place = partial + (line * num_splits + splits)[:, None] * VALUE_DIM + dims[None, :]
        part = tl.load(place, mask=used[:, None] & (dims < VALUE_DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(part_top - base)
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(part_total * weights, axis=0)
        result = result * shrink + tl.sum(part * weights[:, None], axis=0)
        top = new_top
    if lse is not None:
        # Of the tokens alone; a sink is added by whoever merges parts.
        known = top + tl.log(tl.where(total > 0, total, 1.0))
        known = tl.where(total > 0, known, -float("inf"))
        tl.store(lse + line + tl.arange(0, 1), known)
    if sinks is not None:
        total = total + tl.exp(sink - top)
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(out + line * VALUE_DIM + dims, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM)
