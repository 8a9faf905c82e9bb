"""`attend`: one call for every kind of attention, which picks the path by shape."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.attention import cpu
from mnemon.attention.grouped import explicit_attention, fused_attention, spread_attention
from mnemon.attention.packed import attend_packed
from mnemon.attention.stream import StreamedTensor, attend_stream
from mnemon.attention.triton import decode as decode_on_gpu
from mnemon.attention.triton import supports as served_on_gpu
from mnemon.attention.watched import WatchedTensor, report
from mnemon.errors import CacheError
from mnemon.formats import PackedTensor
from mnemon.types import Keys, Queries, Values

__all__ = ["FEW_ROWS", "attend", "check_shapes", "merge_masks"]

# Up to this many query rows, the rows of a group are folded under one key head (`fused_attention`);
# with more, the group becomes the head axis, whose kernel can use its own causal flag.
FEW_ROWS = 16


def attend(
    query: Queries,
    keys: Keys,
    values: Values,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention over stored keys and values, read where they lie.

    Args:
        query: queries, [batch, heads, new, head_dim].
        keys: keys, [batch, kv_heads, tokens, head_dim], strided as a buffer with reserve hands
            them out; ``heads`` is a multiple of ``kv_heads``. A `PackedTensor` is read packed; who
            watches a `WatchedTensor` is told.
        values: values, [batch, kv_heads, tokens, value_dim]; value_dim may differ from head_dim.
            Packed where the keys are.
        mask: which tokens are seen: bool (True = seen) or numbers added to the scores;
            broadcastable to [batch, heads, new, tokens].
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
        causal: query row i sees the tokens up to ``tokens - new + i`` (the last row sees all).
        softcap: bound on the scores, ``tanh(score / softcap) * softcap``.
        sinks: one score per head that takes part in the softmax and carries no value, [heads].
        bias: numbers added to the scores, broadcastable to [batch, heads, new, tokens].

    Returns:
        The output in the query's dtype, [batch, heads, new, value_dim]. A row that sees nothing
        (by a bool mask) is zero.

    Raises:
        CacheError: head counts, lengths or the mask's shape do not fit together.

    Source:
        The conventions of `mnemon.attention.reference.attention`, which is the oracle of this one.
    """
    check_shapes(query, keys, values, mask)
    if bias is not None and bias.ndim < 4:
        bias = bias[(None,) * (4 - bias.ndim)]
    if isinstance(keys, WatchedTensor):
        mask = keys.watch.mask(mask, query)
        attended = attend(
            query, keys.content, values,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
        report(
            keys.watch, query, keys.content,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
        return attended
    if (
        isinstance(keys, StreamedTensor)
        and isinstance(values, StreamedTensor)
        and keys.stream is values.stream
        and keys.is_keys
        and not values.is_keys
    ):
        return attend_stream(
            query, keys.stream,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
    if (
        query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and cpu.serves(query, keys, values, mask, bias, sinks)
    ):
        return cpu.decode(
            query, keys, values,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
    if (
        query.device.type == "cuda"
        and (isinstance(keys, PackedTensor) or query.dtype != torch.float32)
        and served_on_gpu(query, keys, values)
    ):
        out = decode_on_gpu(
            query, keys, values,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    if isinstance(keys, PackedTensor) and isinstance(values, PackedTensor):
        return attend_packed(
            query, keys.half, values.half,
            mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks, bias=bias,
        )  # fmt: skip
    num_new, num_tokens = query.shape[2], keys.shape[2]
    plain_scores = softcap is None and sinks is None
    if num_new == 1:
        causal = False  # a single row sees everything
    # Branches rather than one expression: under dynamic shapes a comparison is no plain bool.
    kernel_causal = False
    if causal and plain_scores and mask is None and bias is None and num_new == num_tokens:
        kernel_causal = True
    if causal and not kernel_causal:
        seen = torch.ones(num_new, num_tokens, dtype=torch.bool, device=query.device)
        mask = merge_masks(seen.tril(num_tokens - num_new)[None, None], mask, query.dtype)
    if bias is not None:
        mask = merge_masks(mask, bias, query.dtype)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)

    if not plain_scores:
        return explicit_attention(query, keys, values, mask, scale, softcap, sinks)
    if torch.compiler.is_compiling():
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=kernel_causal, scale=scale, enable_gqa=grouped
        )
    if num_new <= FEW_ROWS and not kernel_causal:
        return fused_attention(query, keys, values, mask, scale)
    return spread_attention(query, keys, values, mask, scale, kernel_causal)


def merge_masks(mask: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks at once: the meet of two bools, otherwise their sum as numbers of ``dtype``."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        return other.to(dtype).masked_fill(~mask, -torch.inf)
    if other.dtype == torch.bool:
        return mask.to(dtype).masked_fill(~other, -torch.inf)
    return (mask + other).to(dtype)


def check_shapes(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Raise `CacheError` unless the four fit together, naming what came and what was expected."""
    if not keys.shape[1] or query.shape[1] % keys.shape[1]:
        raise CacheError(
            f"{query.shape[1]} query heads cannot share {keys.shape[1]} key heads: expected a "
            "multiple; check that keys come as [batch, kv_heads, tokens, head_dim]"
        )
    if (
        keys.shape[:3] != values.shape[:3]
        or query.shape[-1] != keys.shape[-1]
        or query.shape[0] != keys.shape[0]
    ):
        raise CacheError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not fit: expected keys and values of the query's batch, of "
            "one head count and length, and keys as wide as queries; pass them as the cache layer "
            "returned them"
        )
    if mask is not None and (mask.ndim != 4 or mask.shape[-1] not in (1, keys.shape[2])):
        raise CacheError(
            f"a mask of shape {tuple(mask.shape)} does not cover {keys.shape[2]} stored tokens: "
            "expected [batch or 1, heads or 1, new or 1, tokens]; build it from the lengths that "
            "the cache's get_mask_sizes gives, or cut it to the keys"
        )
    if mask is not None:
        for size, full in zip(mask.shape[:3], query.shape[:3], strict=True):
            if size != 1 and size != full:
                raise CacheError(
                    f"a mask of shape {tuple(mask.shape)} does not fit a query of shape "
                    f"{tuple(query.shape)}: expected [batch or 1, heads or 1, new or 1, tokens]"
                )
