"""The native kernels where tensors end, are empty, or do not fit: what is served and what is not.

Every tensor here is its own allocation, so that `make sanitize` sees a load behind its end.
"""

import warnings

import pytest
import torch
from torch import Tensor

from mnemon.attention import attend, cpu
from mnemon.attention.packing import pack_blocks, unpack_blocks
from mnemon.attention.reference import attention
from mnemon.errors import CacheError
from mnemon.formats import PackedHalf, PackedSide, PackedTensor, Scheme, quantize_blocks

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    ISAS = cpu.instruction_sets()

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension is not built")
each_isa = pytest.mark.parametrize("isa", ISAS)

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
WIDTHS = (1, 2, 7, 8, 20, 31, 33, 64, 100, 264)


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(x: Tensor, code: str, axis: str, is_keys: bool, skipped: int = 0) -> PackedHalf:
    """Whole blocks packed, the rest as a tail of its own."""
    width = x.shape[-1]
    group = 0 if axis == "channel" else min(64, -(-width // 16) * 16)
    how = Scheme(code=code, axis=axis, group_size=group, rotated=False)
    whole = x.shape[2] // 64 * 64
    blocks, factors = quantize_blocks(x[:, :, :whole], how, is_keys=is_keys)
    side = PackedSide(blocks=blocks, factors=factors, scheme=how, width=width, is_keys=is_keys)
    return PackedHalf(side=side, tail=x[:, :, whole:].clone(), num_skipped=skipped)


def numbers(half: PackedHalf) -> Tensor:
    assert half.side is not None
    packed = half.side.numbers(0, half.num_blocks).double()[:, :, half.num_skipped :]
    return torch.cat([packed, half.tail.double()], dim=2)


@each_isa
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_dense_up_to_the_last_byte(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for value_width in (width, 33):
            for tokens in (1, 15, 17, 63, 65, 1025):
                for rows in (1, 3, 5):
                    query = draw(1, 2 * rows, 1, width, dtype=dtype)
                    keys = draw(1, 2, tokens, width, dtype=dtype, seed=1)
                    values = draw(1, 2, tokens, value_width, dtype=dtype, seed=2)
                    found = cpu.decode(query, keys, values, isa=isa)
                    expected = attention(query, keys, values)
                    # One value dim that is nearly 0 has no relative precision of its own.
                    slack = 4 if min(width, value_width) < 8 else 1
                    case = (width, value_width, tokens, rows)
                    assert deviation(found, expected) <= slack * LIMITS[dtype], case


@each_isa
@pytest.mark.parametrize("code", ["int8", "int4", "int2", "fp8"])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_packed_up_to_the_last_byte(isa: str, code: str, axis: str) -> None:
    for width, value_width in ((8, 20), (20, 8), (33, 100), (100, 33), (264, 72)):
        for tokens, skipped in ((64, 0), (64, 63), (129, 1), (1089, 0)):
            query = draw(1, 6, 1, width)
            keys = pack(draw(1, 2, tokens, width, seed=1), code, axis, True, skipped)
            values = pack(draw(1, 2, tokens, value_width, seed=2), code, axis, False, skipped)
            for given in (query, query.bfloat16()):
                expected = attention(given.double(), numbers(keys), numbers(values))
                found = cpu.decode(given, keys, values, isa=isa)
                limit = 1e-5 if given is query else LIMITS[torch.bfloat16]
                assert deviation(found, expected) <= limit, (width, tokens, skipped)


@each_isa
@pytest.mark.parametrize("code", ["int8", "int4", "int2", "fp8"])
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_packing_and_unpacking_up_to_the_last_byte(
    isa: str, code: str, axis: str, dtype: torch.dtype
) -> None:
    for width in (1, 8, 20, 33, 100):
        group = 0 if axis == "channel" else min(64, -(-width // 16) * 16)
        how = Scheme(code=code, axis=axis, group_size=group, rotated=width % 4 == 0)
        for is_keys in (True, False):
            x = draw(2, 1, 64, width, dtype=dtype)
            side = PackedSide(
                blocks=torch.zeros(2, 1, 1, how.block_bytes(width), dtype=torch.uint8),
                factors=torch.empty(2, 1, 1), scheme=how, width=width, is_keys=is_keys,
            )  # fmt: skip
            assert cpu.pack(x, side, isa=isa)
            back = torch.empty(2, 1, 64, width, dtype=dtype)
            cpu.unpack(side, 0, back, isa=isa)
            assert deviation(back, side.numbers(0, 1).double()) <= LIMITS[dtype]


@each_isa
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_masks_of_size_one_in_every_dimension(isa: str, dtype: torch.dtype) -> None:
    batch, heads, new, tokens = 2, 4, 3, 131
    query = draw(batch, heads, new, 24)
    dense = (draw(batch, 2, tokens, 24, seed=1), draw(batch, 2, tokens, 40, seed=2))
    packed = (pack(dense[0], "int8", "token", True), pack(dense[1], "int8", "token", False))
    plain = (numbers(packed[0]), numbers(packed[1]))
    full = (batch, heads, new, tokens)
    for ones in range(16):
        shape = [1 if ones >> i & 1 else size for i, size in enumerate(full)]
        mask = draw(*shape, seed=ones) > -0.2 if dtype is torch.bool else draw(*shape).to(dtype)
        for name in ("mask", "bias"):
            added = {name: mask}
            if name == "bias" and dtype is torch.bool:
                continue
            expected = attention(query, *dense, **added)
            assert deviation(cpu.decode(query, *dense, isa=isa, **added), expected) <= 1e-6
            expected = attention(query.double(), *plain, **added)
            assert deviation(cpu.decode(query, *packed, isa=isa, **added), expected) <= 1e-5


@each_isa
def test_no_tokens_give_zeros(isa: str) -> None:
    query, keys, values = draw(2, 4, 3, 32), torch.empty(2, 2, 0, 32), torch.empty(2, 2, 0, 48)
    assert cpu.serves(query, keys, values)
    empty = [(keys, values)]
    for num_blocks in (None, 0):
        halves = []
        for x, is_keys in ((keys, True), (values, False)):
            how = Scheme(code="int4", axis="token", group_size=32, rotated=False)
            side = PackedSide(
                blocks=torch.empty(2, 2, 0, how.block_bytes(x.shape[-1]), dtype=torch.uint8),
                factors=torch.empty(2, 2, 0), scheme=how, width=x.shape[-1], is_keys=is_keys,
            )  # fmt: skip
            halves.append(PackedHalf(side=None if num_blocks is None else side, tail=x))
        empty.append((halves[0], halves[1]))
    mask = torch.ones(2, 1, 3, 0, dtype=torch.bool)
    for given_keys, given_values in empty:
        for options in ({}, {"causal": True}, {"mask": mask}, {"sinks": torch.zeros(4)}):
            found = cpu.decode(query, given_keys, given_values, isa=isa, **options)
            assert found.shape == (2, 4, 3, 48)
            assert not found.any()
        out, lse = cpu.decode_part(query, given_keys, given_values)
        assert not out.any()
        assert torch.equal(lse, torch.full((2, 4, 3), -torch.inf))


@each_isa
def test_blocks_without_a_tail_and_a_tail_without_blocks(isa: str) -> None:
    x, y = draw(1, 2, 128, 32, seed=1), draw(1, 2, 128, 32, seed=2)
    query = draw(1, 4, 2, 32)
    keys, values = pack(x, "int8", "token", True), pack(y, "int8", "token", False)
    assert not keys.tail.shape[2]
    expected = attention(query.double(), numbers(keys), numbers(values), causal=True)
    assert deviation(cpu.decode(query, keys, values, causal=True, isa=isa), expected) <= 1e-5
    keys, values = PackedHalf(side=None, tail=x), PackedHalf(side=None, tail=y)
    found = cpu.decode(query, keys, values, causal=True, isa=isa)
    assert torch.equal(found, cpu.decode(query, x, y, causal=True, isa=isa))


@each_isa
def test_no_rows(isa: str) -> None:
    keys, values = draw(2, 2, 70, 32), draw(2, 2, 70, 16)
    found = cpu.decode(torch.empty(2, 4, 0, 32), keys, values, causal=True, isa=isa)
    assert found.shape == (2, 4, 0, 16)


def test_an_empty_batch_is_left_to_torch() -> None:
    query, keys = torch.empty(0, 4, 1, 32), torch.empty(0, 2, 9, 32)
    values = torch.empty(0, 2, 9, 8)
    assert not cpu.serves(query, keys, values)
    assert attend(query, keys, values).shape == (0, 4, 1, 8)
    assert cpu.decode(query, keys, values).shape == (0, 4, 1, 8)
    how = Scheme(code="int8", axis="token", group_size=32, rotated=False)
    blocks, factors = pack_blocks(torch.empty(0, 2, 64, 32), how, True)
    assert (blocks.shape, factors.shape) == ((0, 2, 1, how.block_bytes(32)), (0, 2, 1))
    side = PackedSide(blocks=blocks, factors=factors, scheme=how, width=32, is_keys=True)
    assert unpack_blocks(side, 0, 1, torch.float32).shape == (0, 2, 64, 32)


def test_what_does_not_fit_the_scores_is_refused() -> None:
    query, keys, values = draw(2, 4, 3, 16), draw(2, 2, 40, 16), draw(2, 2, 40, 16)
    assert cpu.serves(query, keys, values, torch.ones(2, 4, 3, 40, dtype=torch.bool))
    for shape in ((2, 1, 3, 39), (2, 1, 3, 41), (2, 1, 2, 40), (2, 3, 3, 40), (3, 1, 3, 40)):
        for dtype in (torch.bool, torch.float32):
            added = torch.zeros(shape, dtype=dtype)
            assert not cpu.serves(query, keys, values, added)
            assert not cpu.serves(query, keys, values, bias=added)
            with pytest.raises((CacheError, RuntimeError)):
                attend(query, keys, values, mask=added)
    assert not cpu.serves(query, keys, values, torch.ones(3, 40, dtype=torch.bool))
    assert not cpu.serves(query, keys, values, torch.zeros(1, 1, 3, 40, dtype=torch.int64))
    assert not cpu.serves(query, keys, values, torch.zeros(1, 1, 3, 40, device="meta"))
    assert not cpu.serves(query, keys, values, sinks=torch.zeros(3))
    assert not cpu.serves(query, keys, values, sinks=torch.zeros(4, requires_grad=True))
    with torch.no_grad():
        assert cpu.serves(query, keys, values, sinks=torch.zeros(4, requires_grad=True))


def test_a_bias_of_fewer_dimensions() -> None:
    query, keys, values = draw(2, 4, 3, 16), draw(2, 2, 40, 16, seed=1), draw(2, 2, 40, 16, seed=2)
    for shape in ((40,), (3, 40), (4, 1, 40)):
        bias = draw(*shape, seed=3)
        expected = attention(query, keys, values, bias=bias)
        assert deviation(attend(query, keys, values, bias=bias), expected) <= 1e-6


def test_halves_that_are_cut_differently_are_left_to_torch() -> None:
    query, x, y = draw(1, 4, 1, 32), draw(1, 2, 150, 32, seed=1), draw(1, 2, 150, 32, seed=2)
    keys = pack(x, "int8", "token", True)
    other = pack(y[:, :, :64], "int8", "token", False)
    values = PackedHalf(side=other.side, tail=y[:, :, 64:])
    assert keys.shape == values.shape
    assert not cpu.serves(query, PackedTensor(keys), PackedTensor(values))
    expected = attention(query.double(), numbers(keys), numbers(values))
    found = attend(query, PackedTensor(keys), PackedTensor(values))
    assert deviation(found, expected) <= 1e-5
    with pytest.raises(CacheError, match="expected as many"):
        cpu.decode(query, keys, values)


def test_lengths_that_do_not_fit_are_errors() -> None:
    query, keys, values = draw(2, 4, 1, 16), draw(2, 2, 40, 16), draw(2, 2, 39, 16)
    with pytest.raises(CacheError, match="one batch, head count and length"):
        cpu.decode(query, keys, values)
    for shape in ((1,), (2, 1), (2, 4)):
        with pytest.raises(CacheError, match="lengths or starts"):
            cpu.decode(query, keys, keys, lengths=torch.ones(shape, dtype=torch.int32))


@each_isa
def test_lengths_beyond_the_tokens_read_nothing_more(isa: str) -> None:
    query, keys, values = draw(2, 4, 1, 16), draw(2, 2, 70, 16, seed=1), draw(2, 2, 70, 16, seed=2)
    found = cpu.decode(query, keys, values, lengths=torch.tensor([500, 70]), isa=isa)
    assert torch.equal(found, cpu.decode(query, keys, values, isa=isa))
    found = cpu.decode(query, keys, values, lengths=torch.tensor([-3, 0]), isa=isa)
    assert not found.any()


@each_isa
def test_strides_of_every_kind(isa: str) -> None:
    query = draw(2, 1, 4, 24).transpose(1, 2)
    x = draw(2, 70, 2, 24, seed=1).transpose(1, 2)
    across = draw(2, 2, 24, 70, seed=2).transpose(2, 3)
    spread = draw(1, 1, 70, 24, seed=3).expand(2, 2, 70, 24)
    backwards = draw(2, 2, 1, 24, seed=4).expand(2, 2, 70, 24)
    expected = attention(query, x, across)
    assert deviation(cpu.decode(query, x, across, isa=isa), expected) <= 1e-6
    expected = attention(query, spread, backwards)
    assert deviation(cpu.decode(query, spread, backwards, isa=isa), expected) <= 1e-6


def test_unknown_instruction_sets_are_an_error() -> None:
    x = draw(1, 1, 4, 8)
    with pytest.raises(ValueError, match="has no kernels called mmx"):
        cpu.decode(x[:, :, :1], x, x, isa="mmx")


def test_tensors_without_an_address_and_traces_stay_with_torch() -> None:
    class Other(torch.Tensor):
        """A subclass that means something else by its numbers."""

    query = torch.randn(1, 2, 1, 16)
    keys, values = torch.randn(2, 1, 2, 9, 16)
    assert cpu.serves(query, keys, values)
    assert not cpu.serves(query, keys.as_subclass(Other), values)

    served = []

    def ask(query: torch.Tensor) -> torch.Tensor:
        served.append(cpu.serves(query, keys, values))
        return query + 1

    with pytest.warns(DeprecationWarning, match="trace"):
        torch.jit.trace(ask, (query,), check_trace=False)
    assert served == [False]
