"""Attention over some of the tokens, and merging: what streams tiles through little memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemon.attention.one_part import Part, combine
from mnemon.attention.packed import packed_part
from mnemon.formats import PackedHalf, PackedTensor
from mnemon.types import Keys, Queries, Values

__all__ = ["attend_part", "combine_parts", "merge_parts"]


def attend_part(
    query: Queries,
    keys: Keys,
    values: Values,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Part:
    """Attention over a part of the tokens, normalised within it.

    Args:
        query: queries, [batch, heads, new, head_dim].
        keys: keys of the part, [batch, kv_heads, tokens, head_dim]; dense or a `PackedTensor`.
        values: values of the part, [batch, kv_heads, tokens, value_dim]; the same.
        mask: which of its tokens are seen: bool, or numbers added to the scores; broadcastable to
            [batch, heads, new, tokens].
        scale: factor on the dot products; None is ``head_dim ** -0.5``.
        softcap: bound on the scores.
        bias: numbers added to the scores.

    Returns:
        The output, float32 [batch, heads, new, value_dim], and ``log(sum(exp(score)))``, float32
        [batch, heads, new]; 0 and -inf for a row that sees nothing.

    Raises:
        CacheError: shapes that do not fit together.
    """
    return packed_part(
        query, _half(keys), _half(values), mask=mask, scale=scale, softcap=softcap, bias=bias
    )


def combine_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Part:
    """Several parts as one part, in the order given."""
    part: Part | None = None
    for out, lse in zip(outs, lses, strict=True):
        part = combine(part, (out, lse))
    assert part is not None, "at least one part"
    return part


def merge_parts(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> Tensor:
    """Attention over all tokens from that over its parts, in the order given.

    Args:
        outs: of `attend_part`, each float32 [batch, heads, new, value_dim].
        lses: of `attend_part`, each float32 [batch, heads, new].
        sinks: one score per head that takes part in the softmax and carries no value, [heads].

    Returns:
        float32 [batch, heads, new, value_dim]; a row that sees nothing is zero.
    """
    out, lse = combine_parts(outs, lses)
    if sinks is None:
        return out
    return out * torch.sigmoid(lse - sinks.to(torch.float32)[:, None])[..., None]


def _half(x: Tensor) -> PackedHalf:
    return x.half if isinstance(x, PackedTensor) else PackedHalf(side=None, tail=x)
