"""Numbers to codes and scales, and back. Exact float32 arithmetic: kernels give the same bytes.

    number(t, d) = factor * (scale * code + zero)         int8, int4, int2
    number(t, d) = factor * scale * e4m3(code)            fp8

``factor`` is a power of two per block, 1 unless the numbers would not fit float16. ``zero`` is the
largest float16 that is no larger than the group's lowest number, ``scale`` the smallest that
reaches its highest: nothing is ever clipped.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.errors import CacheError
from mnemon.formats.scheme import Scheme, padded_width

__all__ = ["Quantized", "dequantize", "quantize"]

_LARGEST, _SMALLEST = 16384.0, 2.0**-6  # what float16 scales and offsets serve well
_FP8_MAX = 448.0
_MANTISSA = 10
_LEAST_EXPONENT = -126.0  # of a normal float32
_LEAST_HALF = 2.0**-14  # the smallest normal float16
_A_LITTLE = 1 + 2.0**-10


class Quantized(NamedTuple):
    """Codes and scales of blocks; ``...`` is ``[batch, kv_heads, blocks]``.

    Args:
        codes: uint8 ``[..., 64, padded]`` (of fp8 the bits of e4m3).
        scales: float16, axis ``token``: ``[..., groups, 1 or 2, 64]``; axis ``channel``:
            ``[..., 1 or 2, padded]``. Entry 0 of the pair is the scale, entry 1 the offset.
        factors: float32 ``[...]``.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor


def quantize(x: Tensor, scheme: Scheme) -> Quantized:
    """Quantize blocks ``[..., 64, width]`` that are rotated already where the scheme rotates.

    Raises:
        CacheError: a number that is not finite.
    """
    width, padded = x.shape[-1], padded_width(x.shape[-1])
    y = x.to(torch.float32)
    factors = _factors(y.abs().amax(dim=(-2, -1)))
    y = y / factors[..., None, None]
    if scheme.axis == "channel":
        codes, scales = _quantize_groups(y, scheme, dim=-2)
        codes = F.pad(codes, (0, padded - width))
        scales = [F.pad(scale, (0, padded - width)).squeeze(-2) for scale in scales]
        return Quantized(codes, torch.stack(scales, dim=-2), factors)
    parts, groups = [], []
    for group in torch.split(y, scheme.group_size, dim=-1):
        part, scales = _quantize_groups(group, scheme, dim=-1)
        parts.append(part)
        groups.append(torch.stack([scale.squeeze(-1) for scale in scales], dim=-2))
    codes = F.pad(torch.cat(parts, dim=-1), (0, padded - width))
    return Quantized(codes, torch.stack(groups, dim=-3), factors)


def dequantize(found: Quantized, scheme: Scheme, width: int) -> Tensor:
    """The numbers behind codes, float32 ``[..., 64, width]``, still rotated."""
    codes = found.codes[..., :width]
    if scheme.code == "fp8":
        numbers = _float8(codes)
    else:
        numbers = codes.to(torch.float32)
    scales = found.scales.to(torch.float32)
    if scheme.axis == "channel":
        per_scale = scales[..., :width].unsqueeze(-2)  # [..., 1 or 2, 1, width]
        numbers = numbers * per_scale[..., 0, :, :]
        if scheme.has_zero:
            numbers = numbers + per_scale[..., 1, :, :]
    else:
        size, num_groups = scheme.group_size, scales.shape[-3]
        whole = num_groups * size == width
        grouped = numbers if whole else F.pad(numbers, (0, num_groups * size - width))
        grouped = grouped.unflatten(-1, (num_groups, size))  # [..., 64, groups, size]
        each = scales.movedim(-1, -3).unsqueeze(-1)  # [..., 64, groups, 1 or 2, 1]
        grouped = grouped * each[..., 0, :]
        if scheme.has_zero:
            grouped = grouped + each[..., 1, :]
        numbers = grouped.flatten(-2)[..., :width]
    return numbers * found.factors[..., None, None]


def _float8(codes: Tensor) -> Tensor:
    """The float32 behind the bits of finite e4m3 numbers; torch's own cast takes 20 ns a number."""
    bits = codes.to(torch.int16)
    # The same sign, exponent and mantissa as float16, whose exponent has another bias (15, not 7).
    half = (bits & 0x80) << 8 | (bits & 0x7F) << 7
    return half.view(torch.float16).to(torch.float32) * 256.0


def _factors(largest: Tensor) -> Tensor:
    """Power of two per block that brings numbers into the range of float16, where needed."""
    finite = torch.isfinite(largest)
    traced = torch.compiler.is_compiling()
    if not traced and largest.device.type != "meta" and not bool(finite.all()):
        raise CacheError(
            "Keys or values hold numbers that are not finite (NaN or infinity), which a packed "
            "format cannot store; nothing was packed. Use the dense format to look at them."
        )
    outside = (largest != 0) & ((largest < _SMALLEST) | (largest > _LARGEST))
    exponents = _exponents(torch.where(outside, largest, 1.0)) - _MANTISSA
    factors = torch.exp2(exponents.clamp(min=_LEAST_EXPONENT))
    factors = torch.where(outside, factors, 1.0)
    # A graph cannot raise: what is not finite stays so, and is seen in what comes out.
    return torch.where(finite, factors, torch.nan) if traced else factors


def _exponents(x: Tensor) -> Tensor:
    """``floor(log2(x))`` of positive float32, exact: the logarithm may round across a power."""
    guess = torch.floor(torch.log2(x)).clamp(min=_LEAST_EXPONENT, max=127.0)
    below = torch.exp2(guess) > x
    above = torch.exp2((guess + 1).clamp(max=127.0)) <= x
    return guess - below.to(x.dtype) + (above & (guess < 127)).to(x.dtype)


def _quantize_groups(y: Tensor, scheme: Scheme, dim: int) -> tuple[Tensor, list[Tensor]]:
    """Codes of groups that lie along `dim`, and their scale (and offset) in float16."""
    if scheme.code == "fp8":
        scale = _half_above(y.abs().amax(dim, keepdim=True) / _FP8_MAX)
        codes = (y * _inverse(scale)).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), [scale.to(torch.float16)]
    # Plus 0: -0 counts as 0, whichever of the two was found first.
    low, high = y.amin(dim, keepdim=True) + 0.0, y.amax(dim, keepdim=True) + 0.0
    zero = _half_below(low)
    scale = _half_above((high - zero) / scheme.levels)
    steps = (y - zero) * _inverse(scale)
    codes = torch.round(steps).clamp_(0, scheme.levels).to(torch.uint8)
    return codes, [scale.to(torch.float16), zero.to(torch.float16)]


def _inverse(scale: Tensor) -> Tensor:
    """``1 / scale``, 0 where the scale is 0."""
    return torch.where(scale > 0, 1.0 / scale, 0.0)


# float16 numbers are worked on as float32: onnxruntime has few operators on float16, and where it
# puts casts around others it drops the rounding between two of them.


def _half_below(x: Tensor) -> Tensor:
    """The largest float16 that is no larger, as float32."""
    nearest = _rounded(x)
    return torch.where(nearest > x, _next_half(nearest, -1.0), nearest)


def _half_above(x: Tensor) -> Tensor:
    """The smallest float16 that is no smaller, as float32."""
    nearest = _rounded(x)
    return torch.where(nearest < x, _next_half(nearest, 1.0), nearest)


def _next_half(x: Tensor, side: float) -> Tensor:
    """The neighbour of a float16 above (`side` 1) or below (-1), in arithmetic that every runtime
    has: half a step and a little more, rounded to float16."""
    size = x.abs()
    step = torch.where(size < _LEAST_HALF, _LEAST_HALF * 2.0**-11, size * 2.0**-11) * _A_LITTLE
    return _rounded(x + side * step)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)
