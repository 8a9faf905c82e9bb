"""What the tests of the Triton kernels share: numbers, packed halves, and the distance."""

import torch
from torch import Tensor

from mnemon.attention.reference import attention
from mnemon.formats import PackedHalf, PackedSide, Scheme, quantize_blocks

__all__ = ["DEVICE", "distance", "half", "normal", "oracle", "scheme"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative, over the whole output; 0 for two outputs of zeros."""
    error = (got.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30))


def scheme(code: str, axis: str, width: int, *, rotated: bool = False, groups: int = 0) -> Scheme:
    """A scheme with a given number of groups (by default one per 64 numbers)."""
    count = groups or max(1, width // 64)
    size = (-(-width // count) + 15) // 16 * 16
    return Scheme(code=code, axis=axis, group_size=size if axis == "token" else 0, rotated=rotated)


def half(
    dense: Tensor, how: Scheme, num_blocks: int, *, is_keys: bool, num_skipped: int = 0
) -> tuple[PackedHalf, Tensor]:
    """Tokens as packed blocks and a tail, and their numbers in float64."""
    blocks, factors = quantize_blocks(dense[:, :, : 64 * num_blocks].float(), how, is_keys=is_keys)
    side = PackedSide(
        blocks=blocks, factors=factors, scheme=how, width=dense.shape[-1], is_keys=is_keys
    )
    tail = dense[:, :, 64 * num_blocks :]
    made = PackedHalf(
        side=side if num_blocks else None,
        tail=tail,
        num_skipped=num_skipped if num_blocks else 0,
    )
    if not num_blocks:
        return made, tail.double()
    packed = side.numbers(0, num_blocks)[:, :, num_skipped:].double()
    return made, torch.cat([packed, tail.double()], dim=2)


def oracle(query: Tensor, keys: Tensor, values: Tensor, **options: object) -> Tensor:
    """The reference, with lengths, starts and windows as a mask.

    ``lengths`` and ``starts`` are lists per sequence (and key head); a row's place is counted from
    its sequence's end.
    """
    batch, num_heads, num_new, _ = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    per_head = (batch, num_kv_heads)
    given = {
        name: torch.as_tensor(options.pop(name, None) or default, device=DEVICE)
        for name, default in (("lengths", num_tokens), ("starts", 0))
    }
    for name, value in given.items():
        value = value[:, None] if value.ndim == 1 else value
        given[name] = value.expand(per_head).repeat_interleave(num_heads // num_kv_heads, 1)
    lengths, starts = given["lengths"][..., None, None], given["starts"][..., None, None]
    place = torch.arange(num_tokens, device=DEVICE)
    last = lengths - num_new + torch.arange(num_new, device=DEVICE)[:, None]
    seen = (place >= starts) & (place < lengths)
    if options.pop("causal", False):
        seen = seen & (place <= last)
    window = options.pop("window", None)
    if window is not None:
        seen = seen & (place > last - window)
    mask = options.pop("mask", None)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask & seen
    elif mask is not None:
        mask = mask.double().masked_fill(~seen, -torch.inf)
    else:
        mask = seen
    return attention(query, keys, values, mask=mask, **options)
