"""Attention over packed tokens and over parts, against the float64 oracle on the same numbers."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.attention import attend, packed
from mnemon.attention.packed import attend_packed
from mnemon.attention.packing import pack_blocks, unpack_blocks
from mnemon.attention.parts import attend_part, combine_parts, merge_parts
from mnemon.attention.reference import attention
from mnemon.errors import CacheError
from mnemon.formats import PackedHalf, PackedSide, PackedTensor
from mnemon.schemes import CODES, Scheme, SideFormat

CHANNEL = SideFormat(code="int4", axis="channel")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TILE_TOKENS", 128)


def half(
    width: int,
    *,
    is_keys: bool,
    blocks: int,
    tail: int,
    skipped: int = 0,
    form: SideFormat = CHANNEL,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    batch: int = 2,
    heads: int = 2,
) -> PackedHalf:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, 64 * blocks + tail, width, generator=generator)
    side = None
    if blocks:
        scheme = form.scheme(width)
        data, factors = pack_blocks(x[:, :, : 64 * blocks], scheme, is_keys)
        side = PackedSide(blocks=data, factors=factors, scheme=scheme, width=width, is_keys=is_keys)
    return PackedHalf(
        side=side, tail=x[:, :, 64 * blocks :].to(dtype), num_skipped=skipped if blocks else 0
    )


def exact(one: PackedHalf) -> torch.Tensor:
    """All tokens in float32, dequantized without rounding to the tail's dtype."""
    if one.side is None:
        return one.tail.float()
    numbers = one.side.numbers(0, one.side.num_blocks)[:, :, one.num_skipped :]
    return torch.cat([numbers, one.tail.float()], dim=2)


def assert_close(got: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> None:
    assert got.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    assert ((got.double() - expected).abs().max() / scale) <= within


def padding(b: int, t: int) -> torch.Tensor:
    """The first row begins with a third of padding."""
    return torch.arange(t) >= torch.tensor([t // 3, 0])[:b, None, None, None]


def pair() -> tuple[PackedHalf, PackedHalf]:
    return tuple(half(16, is_keys=is_keys, blocks=2, tail=9) for is_keys in (True, False))


OPTIONS: dict[str, Any] = {
    "plain": lambda b, h, n, t: {},
    "causal": lambda b, h, n, t: {"causal": True},
    "padding": lambda b, h, n, t: {"mask": padding(b, t)},
    "holes": lambda b, h, n, t: {"mask": torch.rand(b, 1, n, t) > 0.3, "causal": True},
    "added": lambda b, h, n, t: {"mask": torch.randn(b, 1, 1, t), "scale": 0.3},
    "per-head": lambda b, h, n, t: {"bias": torch.randn(1, h, n, t), "causal": True},
    "softcap": lambda b, h, n, t: {"softcap": 2.0, "causal": True},
    "sinks": lambda b, h, n, t: {"sinks": torch.randn(h), "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("num_new", [1, 3, 40])
@pytest.mark.parametrize(
    ("blocks", "tail", "skipped"), [(0, 50, 0), (5, 64, 0), (7, 100, 9), (3, 0, 63), (1, 1, 0)]
)
def test_packed_agrees_with_the_oracle(
    option: str, num_new: int, blocks: int, tail: int, skipped: int
) -> None:
    torch.manual_seed(blocks)
    for width, value_width, group in ((64, 64, 1), (96, 80, 4), (40, 64, 2)):
        keys = half(width, is_keys=True, blocks=blocks, tail=tail, skipped=skipped, seed=1)
        values = half(
            value_width, is_keys=False, blocks=blocks, tail=tail, skipped=skipped, seed=2,
            form=SideFormat(code="int2"),
        )  # fmt: skip
        if num_new > keys.num_tokens:
            return
        query = torch.randn(2, 2 * group, num_new, width)
        options = OPTIONS[option](2, 2 * group, num_new, keys.num_tokens)
        expected = attention(query, exact(keys), exact(values), **options)
        assert_close(attend_packed(query, keys, values, **options), expected)
        got = attend(query, PackedTensor(keys), PackedTensor(values), **options)
        assert_close(got, expected)


@settings(deadline=None, max_examples=30)
@given(
    codes=st.tuples(st.sampled_from(CODES), st.sampled_from(CODES)),
    axes=st.tuples(*2 * [st.sampled_from(["token", "channel"])]),
    rotated=st.tuples(st.booleans(), st.booleans()),
    widths=st.tuples(*2 * [st.sampled_from([8, 32, 64, 96, 128])]),
    blocks=st.integers(1, 6),
    tail=st.integers(0, 130),
    skipped=st.integers(0, 63),
    num_new=st.integers(1, 20),
    group=st.sampled_from([1, 2, 7]),
)
def test_any_format_agrees_with_the_oracle(
    codes: tuple[str, str],
    axes: tuple[str, str],
    rotated: tuple[bool, bool],
    widths: tuple[int, int],
    blocks: int,
    tail: int,
    skipped: int,
    num_new: int,
    group: int,
) -> None:
    forms = [
        SideFormat(code=codes[i], axis=axes[i], rotated=rotated[i], group=32) for i in range(2)
    ]
    keys, values = (
        half(widths[i], is_keys=i == 0, blocks=blocks, tail=tail, skipped=skipped, form=forms[i])
        for i in range(2)
    )
    num_new = min(num_new, keys.num_tokens)
    query = torch.randn(
        2, 2 * group, num_new, widths[0], generator=torch.Generator().manual_seed(0)
    )
    expected = attention(query, exact(keys), exact(values), causal=True)
    assert_close(attend_packed(query, keys, values, causal=True), expected)


@pytest.mark.parametrize("num_new", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, num_new: int) -> None:
    torch.manual_seed(0)
    keys = half(64, is_keys=True, blocks=6, tail=70, dtype=dtype)
    values = half(64, is_keys=False, blocks=6, tail=70, dtype=dtype, seed=1)
    query = torch.randn(2, 4, num_new, 64).to(dtype)
    expected = attention(query, exact(keys), exact(values), causal=True)
    got = attend_packed(query, keys, values, causal=True)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= 4e-3 * expected.norm()


def test_a_row_that_sees_nothing_is_zero() -> None:
    keys, values = pair()
    query = torch.randn(2, 2, 3, 16)
    mask = torch.ones(2, 1, 3, keys.num_tokens, dtype=torch.bool)
    mask[0, :, 1] = False
    out, lse = attend_part(query, PackedTensor(keys), PackedTensor(values), mask=mask)
    assert not bool(out[0, :, 1].any())
    assert bool((lse[0, :, 1] == -torch.inf).all())
    assert bool(torch.isfinite(lse[1]).all())
    assert_close(
        attend_packed(query, keys, values, mask=mask),
        attention(query, exact(keys), exact(values), mask=mask),
    )


@pytest.mark.parametrize("num_new", [1, 30])
@pytest.mark.parametrize("cuts", [(0, 90), (0, 1, 50, 90), (0, 0, 40, 40, 90)])
def test_parts_merge_to_the_whole(cuts: tuple[int, ...], num_new: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 24)
    query, sinks = torch.randn(2, 6, num_new, 16), torch.randn(6)
    mask = torch.rand(2, 1, num_new, 90) > 0.5
    mask[:, :, 0, :60] = False
    parts = [
        attend_part(
            query, keys[:, :, start:stop], values[:, :, start:stop], mask=mask[..., start:stop],
            scale=0.4,
        )
        for start, stop in pairwise(cuts)
    ]  # fmt: skip
    outs, lses = zip(*parts, strict=True)
    assert all(out.dtype == lse.dtype == torch.float32 for out, lse in parts)
    options = {"mask": mask, "scale": 0.4}
    assert_close(merge_parts(outs, lses), attention(query, keys, values, **options))
    assert_close(
        merge_parts(outs, lses, sinks), attention(query, keys, values, sinks=sinks, **options)
    )
    out, lse = combine_parts(outs, lses)
    whole, whole_lse = attend_part(query, keys, values, **options)
    assert_close(out, whole.double())
    assert_close(lse.exp(), whole_lse.exp().double())


def test_dense_parts_of_every_dtype() -> None:
    keys, values, query = (torch.randn(1, 2, 40, 32) for _ in range(3))
    expected = attention(query[:, :, :2], keys, values)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out, _ = attend_part(query[:, :, :2].to(dtype), keys.to(dtype), values.to(dtype))
        assert out.dtype == torch.float32
        assert_close(out, expected, 2e-2)
    with pytest.raises(CacheError, match="cannot share"):
        attend_part(torch.randn(1, 3, 1, 32), keys, values)
    with pytest.raises(CacheError, match="do not fit"):
        attend_part(query, keys, values[:, :, 1:])
    with pytest.raises(CacheError, match="does not cover"):
        attend_part(query, keys, values, mask=torch.ones(1, 1, 1, 3, dtype=torch.bool))


def test_gradients_flow_to_query_and_tail() -> None:
    keys, values = pair()
    tail = keys.tail.clone().requires_grad_()
    keys = PackedHalf(side=keys.side, tail=tail)
    query = torch.randn(2, 2, 3, 16, requires_grad=True)
    attend_packed(query, keys, values, causal=True).square().sum().backward()
    grads = query.grad, tail.grad
    query.grad = tail.grad = None
    dense = torch.cat([exact(keys)[:, :, :128].detach(), tail], dim=2)
    attention(query, dense, exact(values), causal=True).square().sum().backward()
    for got, expected in zip(grads, (query.grad, tail.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_keys", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_packing_and_taking_apart(is_keys: bool, rotated: bool) -> None:
    x = torch.randn(1, 2, 320, 48)
    scheme = Scheme(code="int8", axis="token", group_size=48, rotated=rotated)
    blocks, factors = pack_blocks(x, scheme, is_keys)
    side = PackedSide(blocks=blocks, factors=factors, scheme=scheme, width=48, is_keys=is_keys)
    got = unpack_blocks(side, 1, 3, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), x[:, :, 64:256], rtol=0.02, atol=0.03)
    turned = unpack_blocks(side, 1, 3, torch.float32, unrotate=False)
    assert torch.equal(turned, unpack_blocks(side, 1, 3, torch.float32)) == (not rotated)


def test_rows_that_see_nothing_by_the_lowest_number_are_means() -> None:
    from mnemon.attention.one_part import combine

    low = torch.full((1, 1, 1), torch.finfo(torch.float32).min)
    out, _ = combine((torch.ones(1, 1, 1, 4), low), (torch.ones(1, 1, 1, 4), low))
    assert torch.equal(out, torch.ones(1, 1, 1, 4))
