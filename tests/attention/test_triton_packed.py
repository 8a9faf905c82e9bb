"""Triton's decode over packed keys and values against float64 on the dequantized numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, distance, half, normal, oracle, scheme

from mnemon.errors import CacheError
from mnemon.formats import PackedHalf, PackedSide, PackedTensor, Scheme

pytest.importorskip("triton")

from mnemon.attention.triton import decode, supports

CODES = ("int8", "int4", "int2", "fp8")
#: float32 queries use float32 operands; others float16 ones, as tensor cores do.
LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 4e-3}


def case(
    keys: Scheme, values: Scheme, *, width: int, value_dim: int, blocks: int, tail: int,
    skipped: int = 0, batch: int = 1, heads: int = 2, kv_heads: int = 1, new: int = 1,
    dtype: torch.dtype = torch.float32, outlier: float = 1.0,
) -> tuple[torch.Tensor, PackedHalf, PackedHalf, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Query, both halves, and the numbers behind them in float64."""
    tokens = 64 * blocks + tail
    query = normal(batch, heads, new, width, seed=1, dtype=dtype)
    dense_keys = normal(batch, kv_heads, tokens, width, seed=2)
    dense_keys[..., 3] *= outlier
    dense_values = normal(batch, kv_heads, tokens, value_dim, seed=3)
    key_half, key_numbers = half(
        dense_keys.to(dtype), keys, blocks, is_keys=True, num_skipped=skipped
    )
    value_half, value_numbers = half(
        dense_values.to(dtype), values, blocks, is_keys=False, num_skipped=skipped
    )
    return query, key_half, value_half, key_numbers, value_numbers


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("key_axis", "value_axis"), [("token", "token"), ("channel", "token"), ("token", "channel")]
)
def test_formats(code: str, key_axis: str, value_axis: str) -> None:
    sides = scheme(code, key_axis, 32, rotated=key_axis == "token"), scheme(code, value_axis, 32)
    query, keys, values, *numbers = case(
        *sides, width=32, value_dim=32, blocks=3, tail=70, skipped=5, outlier=20.0
    )
    assert supports(query, keys, values)
    got = decode(query, PackedTensor(keys), PackedTensor(values))
    assert distance(got, oracle(query, *numbers)) <= LIMIT[query.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("code", CODES)
def test_half_precision(code: str, dtype: torch.dtype) -> None:
    axis = "channel" if code == "int2" else "token"
    query, keys, values, *numbers = case(
        scheme(code, axis, 64, rotated=code == "int4"), scheme(code, "token", 64),
        width=64, value_dim=64, blocks=2, tail=3, dtype=dtype, outlier=50.0,
    )  # fmt: skip
    got = decode(query, keys, values)
    assert got.dtype is dtype
    assert distance(got, oracle(query, *numbers)) <= LIMIT[dtype]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    codes=st.sampled_from(["int8 int8", "int4 int2", "int8 int2", "int2 int4", "fp8 int4"]),
    widths=st.sampled_from([(40, 32), (96, 80), (128, 64), (32, 128), (48, 112)]),
    groups=st.sampled_from([0, 1, 2]),
    blocks=st.integers(0, 3),
    tail=st.integers(1, 70),
    skipped=st.integers(0, 63),
    new=st.sampled_from([1, 3, 9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_shapes(
    codes: str, widths: tuple[int, int], groups: int, blocks: int, tail: int, skipped: int,
    new: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    first, second = codes.split()
    query, keys, values, *numbers = case(
        scheme(first, "token", widths[0], rotated=True, groups=groups),
        scheme(second, "token", widths[1], groups=groups),
        width=widths[0], value_dim=widths[1], blocks=blocks, tail=max(tail, new), skipped=skipped,
        new=new, dtype=dtype,
    )  # fmt: skip
    got = decode(query, keys, values, causal=True)
    assert distance(got, oracle(query, *numbers, causal=True)) <= LIMIT[dtype]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e6])
def test_blocks_with_a_factor(size: float) -> None:
    how = scheme("int4", "token", 32)
    query, keys, values, *numbers = case(how, how, width=32, value_dim=32, blocks=2, tail=0)
    dense = torch.cat([numbers[1][:, :, :64], numbers[1][:, :, 64:] * size], dim=2).float()
    values, exact = half(dense, how, 2, is_keys=False)
    got = decode(query, keys, values)
    assert distance(got, oracle(query, numbers[0], exact)) <= 1e-5


def test_options_count_tokens_as_masks_do() -> None:
    how = scheme("int4", "token", 32)
    query, keys, values, *numbers = case(
        how, how, width=32, value_dim=32, blocks=2, tail=10, skipped=9, batch=2, heads=4,
        kv_heads=2, new=3,
    )  # fmt: skip
    tokens = keys.num_tokens
    options = {
        "mask": normal(2, 1, 1, tokens, seed=5) > -1, "bias": normal(1, 4, 3, tokens, seed=6),
        "sinks": normal(4, seed=7), "softcap": 4.0, "causal": True, "window": 60, "scale": 0.4,
    }  # fmt: skip
    expected = oracle(
        query, *numbers, **options, lengths=[tokens, tokens - 3], starts=[[4, 0], [0, 90]]
    )
    lengths = torch.tensor([tokens, tokens - 3], device=DEVICE)
    starts = torch.tensor([[4, 0], [0, 90]], device=DEVICE)
    got = decode(query, keys, values, **options, lengths=lengths, starts=starts)
    assert distance(got, expected) <= 1e-5


def test_alone_as_in_a_batch_of_eight() -> None:
    how = scheme("int2", "token", 32)
    query, keys, values, *_ = case(
        how, how, width=32, value_dim=32, blocks=17, tail=4, batch=8, heads=2
    )
    together = decode(query, keys, values)
    for row in (0, 5):
        one = slice(row, row + 1)
        halves = [
            PackedHalf(
                side=PackedSide(
                    blocks=part.side.blocks[one].clone(), factors=part.side.factors[one].clone(),
                    scheme=how, width=32, is_keys=part.side.is_keys,
                ),
                tail=part.tail[one].clone(),
            )
            for part in (keys, values)
        ]  # fmt: skip
        assert torch.equal(decode(query[one], *halves), together[one]), row


def test_pages_of_blocks() -> None:
    how = scheme("int4", "channel", 32), scheme("int4", "token", 32)
    query, keys, values, *numbers = case(
        *how, width=32, value_dim=32, blocks=4, tail=0, batch=2, heads=4, kv_heads=2
    )
    table = torch.tensor([[2, 0], [3, 1]], device=DEVICE, dtype=torch.int32)
    paged = []
    for part in (keys, values):
        blocks = part.side.blocks.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)
        factors = part.side.factors.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)
        scattered = torch.empty_like(blocks), torch.empty_like(factors)
        scattered[0][table.flatten().long()] = blocks
        scattered[1][table.flatten().long()] = factors
        side = PackedSide(
            blocks=scattered[0], factors=scattered[1], scheme=part.side.scheme, width=32,
            is_keys=part.side.is_keys,
        )  # fmt: skip
        paged.append(PackedHalf(side=side, tail=part.tail.new_empty(4, 2, 0, 32)))
    lengths = torch.tensor([256, 100], device=DEVICE)
    got = decode(query, *paged, lengths=lengths, block_table=table)
    assert torch.equal(got, decode(query, keys, values, lengths=lengths))
    assert distance(got, oracle(query, *numbers, lengths=[256, 100])) <= 1e-5


def test_what_is_not_served() -> None:
    how = scheme("int4", "token", 32)
    query, keys, _, *numbers = case(how, how, width=32, value_dim=32, blocks=2, tail=2)
    assert not supports(query, keys, numbers[1].float())
    with pytest.raises(CacheError, match="packed"):
        decode(query, keys, numbers[1].float())
    turned, _ = half(numbers[1].float(), scheme("int4", "token", 32, rotated=True), 2,
                     is_keys=False)  # fmt: skip
    assert not supports(query, keys, turned)
    shorter, _ = half(numbers[1].float(), how, 1, is_keys=False)
    assert not supports(query, keys, shorter)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="hours in the interpreter")
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_caches(code: str, dtype: torch.dtype) -> None:
    how = scheme(code, "token", 128, rotated=True), scheme(code, "token", 128)
    query, keys, values, *numbers = case(
        *how, width=128, value_dim=128, blocks=312, tail=100, skipped=17, batch=2, heads=32,
        kv_heads=8, new=4, dtype=dtype,
    )  # fmt: skip
    got = decode(query, keys, values, causal=True)
    assert distance(got, oracle(query, *numbers, causal=True)) <= LIMIT[dtype]
    dense = [x.to(dtype) for x in numbers]
    got = decode(query, *dense, causal=True)
    limit = 1e-6 if dtype is torch.float32 else LIMIT[dtype]
    assert distance(got, oracle(query, *dense, causal=True)) <= limit
