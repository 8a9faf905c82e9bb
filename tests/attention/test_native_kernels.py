"""The native kernels against plain float64 maths, on every instruction set that runs here."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemon.attention import attend, cpu
from mnemon.attention.reference import attention
from mnemon.formats import PackedHalf, PackedSide, PackedTensor, quantize_blocks
from mnemon.schemes import CODES, Scheme

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    ISAS = cpu.instruction_sets()

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension is not built")
each_isa = pytest.mark.parametrize("isa", ISAS)

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def deviation(found: Tensor, expected: Tensor) -> float:
    """The distance of two outputs over the size of the one that is right."""
    return float((found.double() - expected).norm() / expected.norm())


def make(
    batch: int, kv: int, group: int, new: int, tokens: int, width: int, value_width: int,
    dtype: torch.dtype, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, and keys and values that lie in a buffer with reserve."""
    chance = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv * group, new, width, generator=chance)
    keys = torch.randn(batch, kv, tokens + 9, width, generator=chance)
    values = torch.randn(batch, kv, tokens + 9, value_width, generator=chance)
    return query.to(dtype), keys.to(dtype)[:, :, 4:-5], values.to(dtype)[:, :, 4:-5]


def scheme(code: str, axis: str, width: int, rotated: bool) -> Scheme:
    group = 0 if axis == "channel" else min(64, -(-width // 16) * 16)
    return Scheme(code=code, axis=axis, group_size=group, rotated=rotated)


def pack(x: Tensor, how: Scheme, is_keys: bool, skipped: int = 0) -> PackedHalf:
    blocks = x.shape[2] // 64
    packed, factors = quantize_blocks(x[:, :, : blocks * 64], how, is_keys=is_keys)
    side = PackedSide(
        blocks=packed, factors=factors, scheme=how, width=x.shape[-1], is_keys=is_keys
    )
    return PackedHalf(side=side, tail=x[:, :, blocks * 64 :], num_skipped=skipped)


def numbers(half: PackedHalf) -> Tensor:
    """What a half stands for, not rounded to the tail's dtype."""
    assert half.side is not None
    packed = half.side.numbers(0, half.num_blocks).double()[:, :, half.num_skipped :]
    return torch.cat([packed, half.tail.double()], dim=2)


@each_isa
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 4, 1, 1000, 128, 128), (2, 2, 3, 5, 333, 64, 80), (1, 1, 1, 1, 1, 40, 32),
        (2, 1, 8, 32, 2100, 96, 96), (1, 2, 7, 2, 65, 256, 128), (1, 4, 1, 1, 20_000, 64, 64),
    ],
    ids=str,
)  # fmt: skip
def test_dense(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    query, keys, values = make(*shape, dtype=dtype)
    found = cpu.decode(query, keys, values, causal=True, isa=isa)
    expected = attention(query, keys, values, causal=True)
    assert found.dtype == dtype
    assert deviation(found, expected) <= LIMITS[dtype]


@each_isa
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("rotated", [False, True])
def test_packed(isa: str, code: str, axis: str, rotated: bool) -> None:
    shapes = [(1, 8, 4, 1, 1100, 128, 128), (2, 2, 3, 5, 333, 64, 80), (1, 1, 1, 1, 70, 40, 32)]
    for shape in shapes:
        query, keys, values = make(*shape, dtype=torch.float32)
        half = pack(keys, scheme(code, axis, shape[5], rotated), True, 7)
        other = pack(values, scheme(code, axis, shape[6], rotated), False, 7)
        expected = attention(query.double(), numbers(half), numbers(other), causal=True)
        found = cpu.decode(query, half, other, causal=True, isa=isa)
        assert deviation(found, expected) <= 1e-5
        rough = query.bfloat16()
        expected = attention(rough.double(), numbers(half), numbers(other), causal=True)
        found = cpu.decode(rough, half, other, causal=True, isa=isa)
        assert deviation(found, expected) <= LIMITS[torch.bfloat16]


@each_isa
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("planted", ["moved", "wide"])
def test_outlier_channels(isa: str, code: str, planted: str) -> None:
    """Four of 128 channels far off, or twenty times as wide: what rounding must not show."""
    query, keys, values = make(1, 4, 4, 1, 4100, 128, 128, torch.float32, seed=3)
    far = torch.where(torch.arange(128) % 32 == 5, 20.0, 0.0)
    keys = keys + far if planted == "moved" else keys * (far + (far == 0))
    axis = "token" if code == "fp8" else "channel"
    half = pack(keys, scheme(code, axis, 128, False), True)
    other = pack(values, scheme(code, "token", 128, False), False)
    for asked, limit in ((query, 1e-5), (query.bfloat16(), 2.5e-3)):
        expected = attention(asked.double(), numbers(half), numbers(other), causal=True)
        found = cpu.decode(asked, half, other, causal=True, isa=isa)
        assert deviation(found, expected) <= limit


@each_isa
def test_every_option(isa: str) -> None:
    batch, kv, group, new, tokens = 3, 2, 2, 3, 200
    query, keys, values = make(batch, kv, group, new, tokens, 64, 64, torch.float32)
    chance = torch.Generator().manual_seed(1)
    shape = (batch, kv * group, new, tokens)
    shown = torch.rand(batch, 1, new, tokens, generator=chance) > 0.3
    shown[0, :, :, :140] = False  # left padding
    shown[1, :, 1] = False  # a row that sees nothing
    options: list[dict[str, object]] = [
        {"mask": shown},
        {"mask": shown[:, :, :1]},
        {"mask": torch.randn(1, kv * group, 1, tokens, generator=chance)},
        {"mask": torch.randn(shape, generator=chance).bfloat16()},
        {"bias": torch.randn(1, kv * group, new, tokens, generator=chance), "mask": shown},
        {"softcap": 0.7},
        {"softcap": 30.0, "sinks": torch.randn(kv * group, generator=chance), "mask": shown},
        {"scale": 0.5, "causal": True},
        {"mask": shown, "causal": True},
    ]
    kinds = [(keys, values)]
    for code in ("int8", "fp8"):
        how = scheme(code, "token", 64, False)
        kinds.append((pack(keys, how, True), pack(values, how, False)))
    for given_keys, given_values in kinds:
        plain = (given_keys, given_values)
        if isinstance(given_keys, PackedHalf):
            plain = (numbers(given_keys), numbers(given_values))
        for option in options:
            expected = attention(query.double(), plain[0], plain[1], **option)
            found = cpu.decode(query, given_keys, given_values, isa=isa, **option)
            assert deviation(found, expected) <= 2e-6, sorted(option)


@each_isa
def test_windows_and_ragged_lengths(isa: str) -> None:
    batch, kv, new, tokens = 2, 2, 4, 300
    query, keys, values = make(batch, kv, 2, new, tokens, 32, 48, torch.float32)
    lengths = torch.tensor([[300, 190], [64, 5]], dtype=torch.int32)
    starts = torch.tensor([[0, 33], [60, 0]], dtype=torch.int32)
    at = torch.arange(tokens)
    row = torch.arange(new)[:, None]
    for window in (None, 20, 1):
        shown = torch.zeros(batch, kv * 2, new, tokens, dtype=torch.bool)
        for b in range(batch):
            for head in range(kv * 2):
                end = int(lengths[b, head // 2])
                own = end - new + row + 1
                seen = (at < own) & (at >= int(starts[b, head // 2]))
                shown[b, head] = seen & (at >= own - window) if window else seen
        expected = attention(query, keys, values, mask=shown)
        found = cpu.decode(
            query, keys, values,
            causal=True, window=window, lengths=lengths, starts=starts, isa=isa,
        )  # fmt: skip
        assert deviation(found, expected) <= 1e-6
        assert torch.equal(found[1, 2:, 0] == 0, expected[1, 2:, 0] == 0)


@each_isa
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "int2", "fp8"])
def test_neither_threads_nor_batch_mates_change_a_bit(isa: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    query, keys, values = make(8, 2, 4, 2, 2500, 64, 64, dtype)
    if kind in CODES:
        how = scheme(kind, "token", 64, False)
        whole = (pack(keys, how, True), pack(values, how, False))
        alone = (pack(keys[3:4], how, True), pack(values[3:4], how, False))
    else:
        whole, alone = (keys, values), (keys[3:4], values[3:4])
    one = cpu.decode(query, *whole, causal=True, threads=1, isa=isa)
    two = cpu.decode(query, *whole, causal=True, threads=2, isa=isa)
    single = cpu.decode(query[3:4], *alone, causal=True, threads=2, isa=isa)
    assert torch.equal(one, two)
    assert torch.equal(one[3:4], single)


@each_isa
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_packing_gives_the_bytes_of_the_torch_code(isa: str, code: str, axis: str) -> None:
    for width, size in ((64, 1.0), (80, 1e-9), (20, 1e9), (128, 300.0)):
        x = torch.randn(2, 3, 192, width, generator=torch.Generator().manual_seed(2)) * size
        x[0, 0, 5] = 0.0
        x[0, 1, :, 3] = 7.0
        x[1, 2, 64:128] = -2.5
        for given_dtype in (torch.float32, torch.bfloat16, torch.float16):
            if size == 1e9 and given_dtype == torch.float16:
                continue
            given_x = x.to(given_dtype)
            for is_keys in (True, False):
                how = scheme(code, axis, width, False)
                blocks, factors = quantize_blocks(given_x, how, is_keys=is_keys)
                side = PackedSide(
                    blocks=torch.zeros_like(blocks), factors=torch.zeros_like(factors),
                    scheme=how, width=width, is_keys=is_keys,
                )  # fmt: skip
                assert cpu.pack(given_x, side, isa=isa)
                assert torch.equal(side.factors, factors)
                assert torch.equal(side.blocks, blocks)
                back = torch.empty(2, 3, 128, width)
                cpu.unpack(side, 1, back, isa=isa)
                assert torch.equal(back, side.numbers(1, 2))


@each_isa
def test_packing_refuses_what_is_not_finite(isa: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(1, 2, 128, 32)
        x[0, 1, 100, 30] = bad
        how = scheme("int4", "token", 32, False)
        blocks = torch.zeros(1, 2, 2, how.block_bytes(32), dtype=torch.uint8)
        side = PackedSide(
            blocks=blocks, factors=torch.ones(1, 2, 2), scheme=how, width=32, is_keys=True
        )
        assert not cpu.pack(x, side, isa=isa)


@each_isa
def test_nan_comes_out_as_nan(isa: str) -> None:
    query, keys, values = make(1, 1, 1, 1, 70, 32, 32, torch.float32)
    keys[0, 0, 3, 5] = float("nan")
    assert cpu.decode(query, keys, values, isa=isa).isnan().all()
    keys[:] = float("nan")
    assert cpu.decode(query, keys, values, isa=isa).isnan().all()


@each_isa
def test_parts_join_to_the_whole(isa: str) -> None:
    from mnemon.attention.parts import merge_parts

    query, keys, values = make(2, 2, 2, 1, 500, 64, 64, torch.float32)
    parts = [
        cpu.decode_part(query, keys[:, :, a:b], values[:, :, a:b])
        for a, b in ((0, 100), (100, 365), (365, 500))
    ]
    found = merge_parts([out for out, _ in parts], [lse for _, lse in parts])
    assert deviation(found, attention(query, keys, values)) <= 1e-6
    del isa


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 6),
    new=st.integers(1, 32),
    tokens=st.one_of(st.integers(32, 400), st.integers(1000, 5000)),
    width=st.integers(2, 34).map(lambda n: n * 8),
    value_width=st.integers(1, 40).map(lambda n: n * 7),
    kind=st.sampled_from(["float32", "bfloat16", "float16", *CODES]),
    axis=st.sampled_from(["token", "channel"]),
    window=st.sampled_from([None, None, 1, 50, 1000]),
    padding=st.integers(0, 30),
    skipped=st.integers(0, 63),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int, kv: int, group: int, new: int, tokens: int, width: int, value_width: int,
    kind: str, axis: str, window: int | None, padding: int, skipped: int, seed: int,
) -> None:  # fmt: skip
    dtype = getattr(torch, kind) if kind not in CODES else torch.float32
    query, keys, values = make(batch, kv, group, new, tokens, width, value_width, dtype, seed)
    plain: tuple[Tensor, Tensor] = (keys, values)
    given_keys: Tensor | PackedHalf = keys
    given_values: Tensor | PackedHalf = values
    if kind in CODES and tokens >= 128:
        given_keys = pack(keys, scheme(kind, axis, width, False), True, skipped)
        given_values = pack(values, scheme(kind, axis, value_width, False), False, skipped)
        plain = (numbers(given_keys), numbers(given_values))
    stored = plain[0].shape[2]
    starts = torch.full((batch,), padding, dtype=torch.int32)
    at, own = torch.arange(stored), stored - new + torch.arange(new)[:, None] + 1
    shown = (at < own) & (at >= padding)
    if window:
        shown = shown & (at >= own - window)
    expected = attention(query.double(), plain[0], plain[1], mask=shown[None, None])
    found = cpu.decode(query, given_keys, given_values, causal=True, window=window, starts=starts)
    limit = 1e-5 if kind in CODES else LIMITS[dtype]
    if not float(expected.norm()):
        assert not found.any()
    else:
        assert deviation(found, expected) <= limit


def test_attend_uses_them_and_takes_packed_tensors() -> None:
    query, keys, values = make(1, 2, 2, 1, 300, 64, 64, torch.float32)
    how = scheme("int4", "token", 64, True)
    half, other = pack(keys, how, True), pack(values, how, False)
    found = attend(query, PackedTensor(half), PackedTensor(other))
    assert torch.equal(found, cpu.decode(query, half, other))


def test_gradients_stay_with_torch() -> None:
    query, keys, values = make(1, 1, 1, 1, 10, 16, 16, torch.float32)
    assert cpu.serves(query, keys, values)
    assert not cpu.serves(query.requires_grad_(), keys, values)
    attend(query, keys, values).sum().backward()
    assert query.grad is not None
