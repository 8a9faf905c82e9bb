"""Triton's quantizing gives the bytes of `mnemon.formats`, and reads them back exactly."""

import pytest
import torch
from triton_cases import normal, scheme

from mnemon.errors import CacheError
from mnemon.formats import PackedSide, quantize_blocks

pytest.importorskip("triton")

from mnemon.attention.triton import pack_blocks, unpack_blocks


def numbers(width: int) -> torch.Tensor:
    """Blocks of every kind: ordinary, tiny, huge, with an outlier, of zeros, of subnormals."""
    x = normal(2, 2, 128, width, seed=4)
    x[0, 0, :64] *= 1e-9
    x[0, 1, :64] *= 1e12
    x[1, 0, 3] *= 1000
    x[1, 1, 64:] = 0
    x[1, 1, :64] *= 1e-41
    return x


@pytest.mark.parametrize("is_keys", [True, False])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("code", ["int8", "int4", "int2", "fp8"])
def test_same_bytes(code: str, axis: str, is_keys: bool) -> None:
    for width, groups in ((40, 1), (96, 3)):
        how = scheme(code, axis, width, rotated=is_keys, groups=groups)
        x = numbers(width)
        blocks, factors = quantize_blocks(x, how, is_keys=is_keys)
        got, got_factors = pack_blocks(x, how, is_keys)
        assert torch.equal(got, blocks)
        assert torch.equal(got_factors, factors)
        side = PackedSide(blocks=blocks, factors=factors, scheme=how, width=width, is_keys=is_keys)
        for unrotate in (True, False):
            expected = side.numbers(1, 1, unrotate=unrotate)
            read = unpack_blocks(side, 1, 1, torch.float32, unrotate=unrotate)
            assert torch.equal(read, expected)
        assert unpack_blocks(side, 0, 0, torch.float16).shape == (2, 2, 0, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    how = scheme("int4", "token", 64)
    x = normal(1, 1, 64, 64).to(dtype)
    blocks, factors = quantize_blocks(x, how, is_keys=True)
    got, got_factors = pack_blocks(x, how, True)
    assert torch.equal(got, blocks)
    assert torch.equal(got_factors, factors)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = normal(1, 2, 64, 32)
    x[0, 1, 5, 6] = bad
    with pytest.raises(CacheError, match="not finite"):
        pack_blocks(x, scheme("int4", "token", 32), True)
