"""`attend` against the float64 oracle, over shapes and every option, drawn by hypothesis."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.attention import attend, cpu
from mnemon.attention.reference import attention
from mnemon.errors import CacheError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    batch: int
    num_kv_heads: int
    group: int
    num_new: int
    num_tokens: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    reserve: int
    seed: int


@st.composite
def cases(draw, max_tokens: int = 40, max_new: int = 24) -> Case:
    num_tokens = draw(st.integers(1, max_tokens))
    return Case(
        batch=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        num_new=draw(st.integers(1, min(max_new, num_tokens))),
        num_tokens=num_tokens,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        value_dim=draw(st.sampled_from([4, 8, 16])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        reserve=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**31)),
    )


def tensors(case: Case, generator: torch.Generator):
    """Queries, and keys and values as a buffer with reserve hands them out."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    num_heads = case.num_kv_heads * case.group
    capacity = case.num_tokens + case.reserve
    # Queries come out of a projection: tokens before heads in memory.
    query = numbers(case.batch, case.num_new, num_heads, case.head_dim).transpose(1, 2)
    keys = numbers(case.batch, case.num_kv_heads, capacity, case.head_dim)
    values = numbers(case.batch, case.num_kv_heads, capacity, case.value_dim)
    keys[:, :, case.num_tokens :] = torch.nan  # reserve must never be read
    values[:, :, case.num_tokens :] = torch.nan
    return query, keys[:, :, : case.num_tokens], values[:, :, : case.num_tokens]


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    scale = expected.abs().max().clamp(min=1.0)
    assert ((got.double() - expected).abs().max() / scale).item() <= TOLERANCE[dtype]


@settings(max_examples=150, deadline=None)
@given(case=cases(), causal=st.booleans(), scale=st.sampled_from([None, 0.3]))
def test_plain_and_causal(case: Case, causal: bool, scale: float | None) -> None:
    query, keys, values = tensors(case, torch.Generator().manual_seed(case.seed))
    got = attend(query, keys, values, causal=causal, scale=scale)
    assert_close(got, attention(query, keys, values, causal=causal, scale=scale), case.dtype)


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    causal=st.booleans(),
    additive=st.booleans(),
    one_row=st.booleans(),
    per_batch=st.booleans(),
    per_head=st.booleans(),
)
def test_masks(
    case: Case, causal: bool, additive: bool, one_row: bool, per_batch: bool, per_head: bool
) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    query, keys, values = tensors(case, generator)
    shape = (
        case.batch if per_batch else 1,
        query.shape[1] if per_head else 1,
        1 if one_row else case.num_new,
        case.num_tokens,
    )
    if additive:
        mask = torch.randn(*shape, generator=generator).to(case.dtype)
    else:
        mask = torch.rand(*shape, generator=generator) < 0.6  # some rows see nothing at all
    got = attend(query, keys, values, mask=mask, causal=causal)
    assert_close(got, attention(query, keys, values, mask=mask, causal=causal), case.dtype)


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    with_sinks=st.booleans(),
    with_bias=st.booleans(),
    with_mask=st.booleans(),
)
def test_softcap_sinks_and_bias(
    case: Case, causal: bool, softcap: float | None, with_sinks: bool, with_bias: bool,
    with_mask: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(case.seed)
    query, keys, values = tensors(case, generator)
    num_heads = query.shape[1]
    options = {
        "softcap": softcap,
        "causal": causal,
        "sinks": torch.randn(num_heads, generator=generator) if with_sinks else None,
        "bias": torch.randn(1, num_heads, case.num_new, case.num_tokens, generator=generator)
        if with_bias
        else None,
        "mask": torch.rand(case.batch, 1, case.num_new, case.num_tokens, generator=generator) < 0.7
        if with_mask
        else None,
    }
    got = attend(query, keys, values, **options)
    assert_close(got, attention(query, keys, values, **options), case.dtype)


def test_long_queries_are_taken_in_parts() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 1030, 8, generator=generator)
    keys = torch.randn(1, 2, 1100, 8, generator=generator)
    values = torch.randn(1, 2, 1100, 8, generator=generator)
    mask = torch.rand(1, 1, 1030, 1100, generator=generator) < 0.5
    got = attend(query, keys, values, mask=mask, causal=True, softcap=5.0)
    expected = attention(query, keys, values, mask=mask, causal=True, softcap=5.0)
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("num_new", [1, 5, 40])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": True}])
def test_a_row_that_sees_nothing_is_zero(num_new: int, options: dict) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 4, num_new, 8, generator=generator)
    keys = torch.randn(2, 2, 40, 8, generator=generator)
    mask = torch.ones(2, 1, num_new, 40, dtype=torch.bool)
    mask[0] = False
    sinks = torch.randn(4, generator=generator) if options.get("sinks") else None
    out = attend(query, keys, keys, mask=mask, softcap=options.get("softcap"), sinks=sinks)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].abs().min() > 0


@pytest.mark.parametrize("num_new", [1, 4, 20])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 3.0}, {"sinks": True}])
def test_gradients_are_those_of_the_oracle(num_new: int, options: dict) -> None:
    generator = torch.Generator().manual_seed(5)
    leaves = [
        torch.randn(2, 4, num_new, 8, generator=generator),
        torch.randn(2, 2, 20, 8, generator=generator),
        torch.randn(2, 2, 20, 8, generator=generator),
    ]
    sinks = torch.randn(4, generator=generator) if options.get("sinks") else None
    options = {**options, "sinks": sinks}
    weight = torch.randn(2, 4, num_new, 8, generator=generator)

    def gradients(function, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [leaf.detach().to(dtype, copy=True).requires_grad_() for leaf in leaves]
        (function(*inputs, **options) * weight.to(dtype)).sum().backward()
        return [leaf.grad for leaf in inputs]

    ours = gradients(attend, torch.float32)
    for got, expected in zip(ours, gradients(attention, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, keys = torch.zeros(1, 3, 1, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(CacheError, match="3 query heads cannot share 2 key heads"):
        attend(query, keys, keys)
    query = torch.zeros(1, 4, 1, 8)
    with pytest.raises(CacheError, match="do not fit"):
        attend(query, keys, keys[:, :, :3])
    with pytest.raises(CacheError, match="does not cover 5 stored tokens"):
        attend(query, keys, keys, mask=torch.ones(1, 1, 1, 7, dtype=torch.bool))


@pytest.mark.parametrize("num_new", [1, 40])
@pytest.mark.parametrize("held", [1, 3])
def test_keys_of_another_batch_are_refused(held: int, num_new: int) -> None:
    query, keys = torch.zeros(2, 4, num_new, 8), torch.zeros(held, 2, 70, 8)
    assert not cpu.serves(query, keys, keys)
    with pytest.raises(CacheError, match="of the query's batch"):
        attend(query, keys, keys)


@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (1, 2, 1, 5), (1, 1, 4, 5)])
def test_masks_of_other_rows_are_refused(shape: tuple[int, ...]) -> None:
    query, keys = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    with pytest.raises(CacheError, match="does not fit a query"):
        attend(query, keys, keys, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("num_new", [1, 7])
def test_a_compiled_call_gives_the_same(num_new: int) -> None:
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(1, 4, num_new, 8, generator=generator)
    keys = torch.randn(1, 2, 7, 8, generator=generator)

    def step(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return attend(query, keys, keys, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, keys), step(query, keys))
