"""Triton's decode over dense keys and values against float64; in its interpreter without a GPU."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, distance, normal, oracle

from mnemon.errors import CacheError, DependencyError

pytest.importorskip("triton")

from mnemon.attention.triton import (
    decode,
    support,
    supports,
)

LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def tensors(
    batch: int, heads: int, kv_heads: int, new: int, tokens: int, width: int, value_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Query, keys and values; keys as a buffer with reserve hands them out."""
    query = normal(batch, new, heads, width, seed=1, dtype=dtype).transpose(1, 2)
    keys = normal(batch, kv_heads, tokens + 7, width, seed=2, dtype=dtype)[:, :, :tokens]
    values = normal(batch, kv_heads, tokens + 7, value_dim, seed=3, dtype=dtype)[:, :, :tokens]
    return query, keys, values


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(list(LIMIT)),
    groups=st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 3)]),
    new=st.sampled_from([1, 2, 5, 32]),
    tokens=st.integers(1, 130),
    width=st.sampled_from([32, 40, 64, 80, 128]),
    value_dim=st.sampled_from([32, 48, 64, 112]),
    causal=st.booleans(),
)
def test_shapes(
    dtype: torch.dtype, groups: tuple[int, int], new: int, tokens: int, width: int,
    value_dim: int, causal: bool,
) -> None:  # fmt: skip
    group, kv_heads = groups
    given = tensors(1, group * kv_heads, kv_heads, new, max(tokens, new), width, value_dim, dtype)
    got = decode(*given, causal=causal)
    assert got.dtype is dtype
    assert distance(got, oracle(*given, causal=causal)) <= LIMIT[dtype]


def test_several_splits_and_wide_heads() -> None:
    given = tensors(1, 2, 1, 1, 1100, 256, 192)
    assert distance(decode(*given, scale=0.3), oracle(*given, scale=0.3)) <= 1e-6


OPTIONS = {
    "left padding": {"starts": [3, 0]},
    "lengths": {"lengths": [5, 90], "causal": True},
    "lengths of heads": {"lengths": [[90, 7], [1, 64]]},
    "window": {"window": 9, "causal": True},
    "window in a padded batch": {"window": 70, "causal": True, "lengths": [80, 90]},
    "softcap": {"softcap": 0.7},
    "wide softcap": {"softcap": 30.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options = OPTIONS[name]
    given = tensors(2, 4, 2, 3, 90, 32, 32)
    expected = oracle(*given, **options)
    on_device = {
        key: torch.tensor(value, dtype=torch.int32, device=DEVICE)
        if isinstance(value, list)
        else value
        for key, value in options.items()
    }
    assert distance(decode(*given, **on_device), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(2, 1, 1, 90), (2, 4, 3, 90), (1, 1, 3, 90), (2, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = tensors(2, 4, 2, 3, 90, 32, 32)
    mask = normal(*shape, seed=5)
    mask = mask > 0 if dtype is torch.bool else mask.to(dtype)
    assert distance(decode(*given, mask=mask), oracle(*given, mask=mask)) <= 1e-6


def test_bias_sinks_and_lse() -> None:
    query, keys, values = tensors(2, 4, 2, 2, 70, 32, 32)
    options = {"bias": normal(1, 4, 2, 70, seed=6), "sinks": normal(4, seed=7), "softcap": 5.0}
    got, lse = decode(query, keys, values, return_lse=True, **options)
    assert distance(got, oracle(query, keys, values, **options)) <= 1e-6
    scores = query.double() @ keys.double().repeat_interleave(2, 1).mT * 32**-0.5
    scores = torch.tanh(scores / 5.0) * 5.0 + options["bias"].double()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_are_zero() -> None:
    query, keys, values = tensors(2, 2, 1, 2, 40, 32, 32)
    mask = torch.ones(2, 1, 2, 40, dtype=torch.bool, device=DEVICE)
    mask[0, :, 1] = False
    lengths = torch.tensor([40, 0], device=DEVICE)
    got, lse = decode(query, keys, values, mask=mask, lengths=lengths, return_lse=True)
    assert torch.equal(got[0, :, 1], torch.zeros_like(got[0, :, 1]))
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert bool((lse[1] == -torch.inf).all())
    assert distance(got[0, :, 0], oracle(query, keys, values)[0, :, 0]) <= 1e-6


def test_numbers_beyond_a_length_are_not_read() -> None:
    query, keys, values = tensors(1, 2, 1, 1, 600, 32, 32)
    lengths = torch.tensor([530], device=DEVICE)
    expected = decode(query, keys[:, :, :530], values[:, :, :530])
    keys[:, :, 530:], values[:, :, 530:] = torch.nan, torch.nan
    assert torch.equal(decode(query, keys, values, lengths=lengths), expected)


def test_alone_as_in_a_batch_of_eight() -> None:
    query, keys, values = tensors(8, 4, 2, 1, 560, 32, 32)
    lengths = torch.tensor([560, 1, 64, 511, 512, 513, 100, 300], device=DEVICE)
    together = decode(query, keys, values, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = decode(query[one], keys[one, :, :length], values[one, :, :length])
        assert torch.equal(alone, together[one]), row


@pytest.mark.parametrize("page_tokens", [64, 192])
def test_pages(page_tokens: int) -> None:
    query, keys, values = tensors(2, 4, 2, 2, 384, 32, 48)
    lengths = torch.tensor([384, 100], device=DEVICE, dtype=torch.int32)
    num_pages = 384 // page_tokens
    table = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(1))
    table = table.to(DEVICE, torch.int32).view(2, num_pages)
    pages = []
    for whole in (keys, values):
        paged = whole.unflatten(2, (num_pages, page_tokens)).transpose(1, 2).flatten(0, 1)
        scattered = torch.empty_like(paged)
        scattered[table.flatten().long()] = paged
        pages.append(scattered)
    table[1, -(-100 // page_tokens) :] = 10**6  # is not followed
    got = decode(query, *pages, lengths=lengths, block_table=table, causal=True)
    assert torch.equal(got, decode(query, keys, values, lengths=lengths, causal=True))


def test_offsets_beyond_32_bits() -> None:
    if psutil.virtual_memory().available < 12 * 2**30:
        pytest.skip("needs 6 GB of address space")
    stride = 2**26
    # Touches a page of memory per token, not the whole of it.
    whole = torch.empty(42 * stride, dtype=torch.float16, device=DEVICE)
    keys = whole.as_strided((1, 1, 42, 32), (0, 0, stride, 1))
    keys.copy_(normal(1, 1, 42, 32, seed=2))
    query = normal(1, 2, 1, 32, dtype=torch.float16)
    assert torch.equal(decode(query, keys, keys), decode(query, keys.clone(), keys.clone()))


def test_what_is_served() -> None:
    query, keys, values = tensors(1, 2, 1, 1, 8, 32, 32)
    assert supports(query, keys, values)
    assert not supports(query.expand(1, 2, 40, 32), keys, values)
    assert not supports(query.double(), keys.double(), values.double())
    assert not supports(query, keys.half(), values)
    assert not supports(query, keys.mT.contiguous().mT, values)
    assert not supports(query, keys.requires_grad_(), values)
    with torch.no_grad():
        assert supports(query, keys, values)
    assert not supports(*tensors(1, 1, 1, 1, 8, 512, 512))


def test_errors_say_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = tensors(2, 4, 2, 1, 8, 32, 32)
    with pytest.raises(CacheError, match="do not fit"):
        decode(query[:, :3], keys, values)
    with pytest.raises(CacheError, match="one length"):
        decode(query, keys, values[:, :, :4])
    with pytest.raises(CacheError, match="one batch"):
        decode(query[:1], keys, values)
    with pytest.raises(CacheError, match="does not cover"):
        decode(query, keys, values, mask=torch.ones(1, 1, 1, 9, dtype=torch.bool))
    table = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(CacheError, match="multiple of 64"):
        decode(query, keys, values, block_table=table)
    monkeypatch.setattr(support, "is_available", lambda: False)
    with pytest.raises(DependencyError, match="pip install"):
        decode(query, keys, values)
