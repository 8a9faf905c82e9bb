"""Rounding to float16 in one direction, over every float16; exponents over every power of two."""

import torch

from mnemon.formats import quantize


def _halves() -> torch.Tensor:
    bits = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).to(torch.float32)
    return torch.unique(bits[torch.isfinite(bits)])


def test_neighbours_of_every_float16() -> None:
    halves = _halves()
    assert torch.equal(quantize._next_half(halves[:-1], 1.0), halves[1:])
    assert torch.equal(quantize._next_half(halves[1:], -1.0), halves[:-1])


def test_below_and_above() -> None:
    halves = _halves()
    between = (halves[1:].double() * 0.3 + halves[:-1].double() * 0.7).float()
    assert torch.equal(quantize._half_below(between), halves[:-1])
    assert torch.equal(quantize._half_above(between), halves[1:])
    assert torch.equal(quantize._half_below(halves), halves)
    assert torch.equal(quantize._half_above(halves), halves)


def test_exponents() -> None:
    powers = torch.exp2(torch.arange(-126.0, 128.0))
    x = torch.cat(
        [powers, torch.nextafter(powers, powers * 2), torch.nextafter(powers, powers / 2)]
    )
    x = x[(x >= 2.0**-126) & torch.isfinite(x)]
    assert torch.equal(quantize._exponents(x).int(), torch.frexp(x).exponent - 1)
