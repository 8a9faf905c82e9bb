"""Without the extension: one warning, and plain torch with the same numbers."""

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mnemon.attention
from mnemon.attention import attend, cpu
from mnemon.attention.packing import pack_blocks, unpack_blocks
from mnemon.attention.parts import attend_part, merge_parts
from mnemon.attention.reference import attention
from mnemon.formats import CODES, PackedHalf, PackedSide, PackedTensor, Scheme

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The extension cannot be imported, as where there was no compiler."""
    monkeypatch.delattr(mnemon.attention, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "mnemon.attention._native", None)
    cpu._module.cache_clear()
    yield
    cpu._module.cache_clear()


@pytest.fixture
def without(absent: None) -> None:
    """The same, after the warning."""
    with pytest.warns(RuntimeWarning, match="native kernels are not there"):
        assert not cpu.is_built()


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query = draw(2, 8, 2, 32, seed=0, dtype=dtype)
    keys = draw(2, 2, 333, 32, seed=1, dtype=dtype)
    return query, keys, draw(2, 2, 333, 48, seed=2, dtype=dtype)


def pack(x: Tensor, how: Scheme, is_keys: bool) -> PackedHalf:
    blocks, factors = pack_blocks(x[:, :, :256], how, is_keys)
    side = PackedSide(
        blocks=blocks, factors=factors, scheme=how, width=x.shape[-1], is_keys=is_keys
    )
    return PackedHalf(side=side, tail=x[:, :, 256:])


@pytest.mark.usefixtures("absent")
def test_one_warning_says_so() -> None:
    query, keys, values = inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            attend(query, keys, values)
            attend_part(query, keys, values)
            pack(keys, Scheme(code="int4", axis="token", group_size=32, rotated=False), True)
        assert cpu.instruction_sets() == []
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "attention runs in plain torch" in str(caught[0].message)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_dense_attention(dtype: torch.dtype) -> None:
    query, keys, values = inputs(dtype)
    assert not cpu.serves(query, keys, values)
    shown = draw(2, 1, 2, 333, seed=3) > 0
    for options in ({}, {"causal": True}, {"mask": shown}, {"softcap": 3.0}):
        expected = attention(query, keys, values, **options)
        assert deviation(attend(query, keys, values, **options), expected) <= LIMITS[dtype]
    cuts = ((0, 100), (100, 333))
    parts = [attend_part(query, keys[:, :, a:b], values[:, :, a:b]) for a, b in cuts]
    found = merge_parts([out for out, _ in parts], [lse for _, lse in parts])
    assert deviation(found, attention(query, keys, values)) <= LIMITS[dtype]


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_packed_attention(code: str, axis: str) -> None:
    query, keys, values = inputs()
    how = Scheme(code=code, axis=axis, group_size=0 if axis == "channel" else 32, rotated=True)
    half, other = pack(keys, how, True), pack(values, how, False)
    expected = attention(query, half.dense(), other.dense(), causal=True)
    found = attend(query, PackedTensor(half), PackedTensor(other), causal=True)
    assert deviation(found, expected) <= 1e-5


@pytest.mark.parametrize("code", CODES)
def test_packing_gives_the_bytes_of_the_extension(
    code: str, request: pytest.FixtureRequest
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if not cpu.is_built():
            pytest.skip("the extension is not built")
    x = draw(2, 2, 128, 48, seed=4)
    how = Scheme(code=code, axis="token", group_size=48, rotated=False)
    blocks, factors = pack_blocks(x, how, True)
    side = PackedSide(blocks=blocks, factors=factors, scheme=how, width=48, is_keys=True)
    numbers = unpack_blocks(side, 0, 2, torch.float32)
    request.getfixturevalue("without")
    found, found_factors = pack_blocks(x, how, True)
    assert torch.equal(found, blocks)
    assert torch.equal(found_factors, factors)
    assert torch.equal(unpack_blocks(side, 0, 2, torch.float32), numbers)


def test_importing_mnemon_warns_of_nothing() -> None:
    script = (
        "import sys; sys.modules['mnemon.attention._native'] = None\n"
        "import mnemon, mnemon.attention.cpu\n"
        "assert not mnemon.attention.cpu._module.cache_info().currsize\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
