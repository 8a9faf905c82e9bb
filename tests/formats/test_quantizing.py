"""Codes, scales and bytes of packed formats: errors bounded, layouts as drawn, nothing clipped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.errors import CacheError
from mnemon.formats import (
    BLOCK_TOKENS,
    CODES,
    PackedSide,
    Scheme,
    dequantize_blocks,
    quantize_blocks,
    rotate,
)
from mnemon.formats.hadamard import rotation_size
from mnemon.formats.layout import pack_codes, read_block, unpack_codes
from mnemon.formats.quantize import _float8, dequantize, quantize
from mnemon.formats.tokens import blocks_of, quantize_tokens, tokens_of
from mnemon.schemes import PackedFormat, SideFormat, default_scheme, padded_width

schemes = st.builds(
    lambda code, axis, group, rotated: SideFormat(
        code=code, axis=axis, group=group, rotated=rotated
    ),
    st.sampled_from(CODES),
    st.sampled_from(["token", "channel"]),
    st.sampled_from([16, 32, 64, 128]),
    st.booleans(),
)
widths = st.sampled_from([1, 3, 8, 16, 24, 64, 80, 96, 128, 200, 256])


def numbers(width: int, blocks: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, blocks * BLOCK_TOKENS, width, generator=generator) * scale


def steps(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """The largest error that quantizing rotated numbers may make: half a step, with rounding."""
    if scheme.code == "fp8":
        return x.abs() * 2**-4 * 1.01 + x.abs().amax() * 2**-9
    dim = -2 if scheme.axis == "channel" else -1
    if dim == -1:
        parts = torch.split(x, scheme.group_size, dim=-1)
        spans = [(p.amax(-1, keepdim=True) - p.amin(-1, keepdim=True)).expand_as(p) for p in parts]
        span = torch.cat(spans, dim=-1)
    else:
        grouped = x.unflatten(-2, (-1, BLOCK_TOKENS))
        low, high = grouped.amin(-2, keepdim=True), grouped.amax(-2, keepdim=True)
        span = (high - low).expand_as(grouped).flatten(-3, -2)
    largest = x.abs().amax()
    return span / scheme.levels * 0.502 + largest * 2**-10


@settings(deadline=None, max_examples=25)
@given(
    side=schemes,
    width=widths,
    blocks=st.integers(0, 3),
    seed=st.integers(0, 99),
    power=st.integers(-100, 100),
    is_keys=st.booleans(),
)
def test_numbers_come_back_within_half_a_step(
    side: SideFormat, width: int, blocks: int, seed: int, power: int, is_keys: bool
) -> None:
    scheme = side.scheme(width)
    x = numbers(width, blocks, seed, 2.0**power)
    packed, factors = quantize_blocks(x, scheme, is_keys=is_keys)
    assert packed.shape == (2, 3, blocks, scheme.block_bytes(width))
    assert packed.dtype == torch.uint8
    assert scheme.block_bytes(width) % 64 == 0
    got = dequantize_blocks(packed, factors, scheme, width, is_keys=is_keys)
    expected = rotate(x) if scheme.rotated else x
    if not blocks:
        assert got.shape == x.shape
        return
    # In units of the block, so that one bound holds for any size of numbers.
    unit = expected.unflatten(-2, (-1, BLOCK_TOKENS)).abs().amax((-1, -2), keepdim=True)
    unit = unit.expand(*unit.shape[:-2], BLOCK_TOKENS, 1).flatten(-3, -2)
    error = (got - expected).abs() / unit
    assert bool((error <= steps(scheme, expected / unit) + 1e-6).all())
    assert bool((factors.log2().frac() == 0).all())
    side_there = PackedSide(
        blocks=packed, factors=factors, scheme=scheme, width=width, is_keys=is_keys
    )
    torch.testing.assert_close(
        side_there.numbers(0, blocks), rotate(got) if scheme.rotated else got
    )


@settings(deadline=None, max_examples=25)
@given(side=schemes, width=widths, seed=st.integers(0, 99))
def test_scales_cover_their_groups(side: SideFormat, width: int, seed: int) -> None:
    """Nothing is clipped: the lowest number is no lower than code 0, the highest no higher than
    the last code."""
    scheme = side.scheme(width)
    x = numbers(width, 1, seed).unflatten(-2, (1, BLOCK_TOKENS))
    x[..., 0] *= 40
    found = quantize(x, scheme)
    if scheme.code == "fp8":
        assert bool(torch.isfinite(dequantize(found, scheme, width)).all())
        return
    shown = found._replace(codes=torch.zeros_like(found.codes))
    low = dequantize(shown, scheme, width)
    high = dequantize(
        shown._replace(codes=torch.full_like(found.codes, scheme.levels)), scheme, width
    )
    assert bool((low <= x).all())
    assert bool((high >= x - 1e-6 * x.abs().amax()).all())


@settings(deadline=None, max_examples=30)
@given(bits=st.sampled_from([2, 4, 8]), width=widths, is_keys=st.booleans(), seed=st.integers(0, 9))
def test_codes_lie_where_the_layout_says(bits: int, width: int, is_keys: bool, seed: int) -> None:
    padded = padded_width(width)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, 64, padded), generator=generator, dtype=torch.uint8)
    data = pack_codes(codes, bits, is_keys=is_keys)
    assert data.shape == (2, 64 * padded * bits // 8)
    assert torch.equal(unpack_codes(data, bits, padded, is_keys=is_keys), codes)
    per_byte = 8 // bits
    for token, dim in [(0, 0), (63, padded - 1), (17, padded // 2), (37, padded // 3)]:
        if is_keys:
            sub, lane = divmod(token, 16)
            quad, inner = divmod(dim, 4)
            row, shift = divmod(sub, per_byte)
            place = ((quad * (4 // per_byte) + row) * 16 + lane) * 4 + inner
        else:
            quarter, inner = divmod(token, 4)
            chunk, lane = divmod(dim, 16)
            shift, row = divmod(quarter, 16 // per_byte)
            place = ((chunk * (16 // per_byte) + row) * 16 + lane) * 4 + inner
        byte = int(data[0, place])
        assert byte >> (bits * shift) & ((1 << bits) - 1) == int(codes[0, token, dim])


def test_scales_lie_behind_the_codes() -> None:
    x = numbers(80, 1, 0)
    for axis, size, shape in (("token", 48, (2, 2, 64)), ("channel", 0, (2, 80))):
        scheme = Scheme(code="int4", axis=axis, group_size=size)
        packed, factors = quantize_blocks(x, scheme, is_keys=True)
        start = 64 * 80 * 4 // 8
        stop = start + 2 * math.prod(shape)
        scales = packed[0, 0, 0, start:stop].contiguous().view(torch.float16).view(shape)
        found = read_block(packed, factors, scheme, 80, is_keys=True)
        assert torch.equal(found.scales[0, 0, 0], scales)
        if axis == "token":
            group = x[0, 0, 5, 48:]
            scale, zero = scales[1, :, 5].float()
        else:
            group = x[0, 0, :, 7]
            scale, zero = scales[:, 7].float()
        assert zero <= group.min() < zero + 0.01
        assert zero + 15 * scale >= group.max() - 1e-6
        assert not bool(packed[..., stop:].any())


@pytest.mark.parametrize("code", CODES)
def test_extremes(code: str) -> None:
    scheme = default_scheme(code, 64, is_keys=True)
    x = torch.zeros(1, 1, 64, 64)
    packed, factors = quantize_blocks(x, scheme, is_keys=True)
    assert not bool(packed.any())
    assert factors.item() == 1.0
    for value in (3e38, -3e38, 1e-38, 65504.0, 2.0**-6, 16384.0):
        x = torch.full((1, 1, 64, 64), value)
        x[..., ::2] *= 0.5
        packed, factors = quantize_blocks(x, scheme, is_keys=False)
        got = dequantize_blocks(packed, factors, scheme, 64, is_keys=False)
        assert bool(torch.isfinite(got).all())
        bound = {"int8": 0.004, "int4": 0.04, "int2": 0.18, "fp8": 0.07}[code]
        assert (got - x).abs().amax() <= bound * abs(value)
        assert (factors.item() == 1.0) == (2.0**-6 <= abs(value) <= 16384)
    tiny = torch.full((1, 1, 64, 64), 1e-45)
    packed, factors = quantize_blocks(tiny, scheme, is_keys=True)
    assert factors.item() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = torch.zeros(1, 1, 128, 16)
    x[0, 0, 100, 3] = bad
    with pytest.raises(CacheError, match="not finite"):
        quantize_blocks(x, default_scheme("int4", 16, is_keys=True), is_keys=True)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"code": "int3", "axis": "token", "group_size": 64}, "Unknown code 'int3'"),
        ({"code": "int4", "axis": "row"}, "Unknown axis"),
        ({"code": "int4", "axis": "token"}, "multiple of 16"),
        ({"code": "int4", "axis": "token", "group_size": 40}, "multiple of 16"),
        ({"code": "int4", "axis": "channel", "group_size": 64}, "0 along 'channel'"),
    ],
)
def test_schemes_that_cannot_be(facts: dict[str, object], says: str) -> None:
    with pytest.raises(CacheError, match=says):
        Scheme(**facts)  # type: ignore[arg-type]


def test_a_scheme_is_its_facts() -> None:
    for code in CODES:
        scheme = default_scheme(code, 96, is_keys=True)
        assert Scheme(**scheme.facts()) == scheme  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="Unknown format"):
        PackedFormat.named("int5")


@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_bits_per_value_keep_their_promise(width: int) -> None:
    for code, most in (("int8", 8.6), ("int4", 4.6), ("int2", 2.8), ("fp8", 8.6)):
        form = PackedFormat.named(code)
        for side in (form.keys, form.values):
            stored = side.scheme(width).stored_bytes(width, 100)
            assert stored * 8 / (100 * 64 * width) <= most


@given(width=st.integers(1, 260), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_rotating_twice_changes_nothing(width: int, seed: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x)
    torch.testing.assert_close(rotate(turned), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    size = rotation_size(width)
    assert width % size == 0
    assert (width // size) % 2 == 1
    if size == 1:
        assert torch.equal(turned, x)


@settings(deadline=None, max_examples=25)
@given(
    code=st.sampled_from(CODES), width=widths, rotated=st.booleans(), seed=st.integers(0, 9),
    is_keys=st.booleans(),
)  # fmt: skip
def test_tokens_move_between_blocks_as_they_are(
    code: str, width: int, rotated: bool, seed: int, is_keys: bool
) -> None:
    scheme = SideFormat(code=code, rotated=rotated).scheme(width)
    x = numbers(width, 3, seed)
    packed, factors = quantize_blocks(x, scheme, is_keys=is_keys)
    side = PackedSide(blocks=packed, factors=factors, scheme=scheme, width=width, is_keys=is_keys)
    found = tokens_of(side)
    fresh = quantize_tokens(x, scheme)
    assert found is not None
    assert fresh is not None
    assert torch.equal(found.codes, fresh.codes)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(seed))[:128]
    moved = found.gather(order.expand(2, 3, 128))
    blocks, ones = blocks_of(moved, scheme, width, is_keys)
    got = dequantize_blocks(blocks, ones, scheme, width, is_keys=is_keys)
    before = dequantize_blocks(packed, factors, scheme, width, is_keys=is_keys)
    assert torch.equal(got, before[:, :, order])


def test_tokens_of_blocks_with_factors_do_not_move() -> None:
    scheme = default_scheme("int8", 64, is_keys=False)
    x = numbers(64, 1, 0, 1e6)
    packed, factors = quantize_blocks(x, scheme, is_keys=False)
    side = PackedSide(blocks=packed, factors=factors, scheme=scheme, width=64, is_keys=False)
    assert tokens_of(side) is None
    assert quantize_tokens(x, scheme) is None


def test_eight_bit_floats_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).to(torch.float32)
    finite = torch.isfinite(expected)
    assert torch.equal(_float8(codes)[finite], expected[finite])
    assert int(finite.sum()) == 254
