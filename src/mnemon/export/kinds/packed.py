"""Keys and values in few bits: blocks of 64 tokens as codes and scales, and a dense tail.

A graph of plain operators takes the blocks apart to read them, all of a layer at a time; between
two calls a cache is as small as outside of a graph, and its blocks are the same.

    past_key_values.0.key.codes    [batch, kv_heads, blocks, bytes]    uint8
    past_key_values.0.key.scales   [batch, kv_heads, blocks, numbers]  float16
    past_key_values.0.key.factors  [batch, kv_heads, blocks]           float32
    past_key_values.0.key.tail     [batch, kv_heads, tail, head_dim]   the model's dtype
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mnemon.errors import ExportError
from mnemon.export.kinds.base import Part, Slot, TokenPart, empty_layer
from mnemon.formats import BLOCK_TOKENS, Scheme, rotate
from mnemon.formats.layout import pack_codes, unpack_codes
from mnemon.formats.quantize import Quantized, dequantize, quantize
from mnemon.formats.scheme import padded_width
from mnemon.layers.base import LayerState
from mnemon.schemes import PackedFormat, SideFormat

__all__ = ["Packed"]

_PER_SIDE = 4


@dataclass(frozen=True, slots=True)
class _Side:
    """How one side's blocks become numbers and back, in plain operators."""

    scheme: Scheme
    width: int
    is_keys: bool

    def numbers(self, codes: Tensor, scales: Tensor, factors: Tensor) -> Tensor:
        """Blocks ``[batch, kv_heads, blocks, ...]`` as tokens, float32."""
        padded, scheme = padded_width(self.width), self.scheme
        if scheme.axis == "channel":
            shape: tuple[int, ...] = (scheme.scales_per_group, padded)
        else:
            shape = (scheme.num_groups(self.width), scheme.scales_per_group, BLOCK_TOKENS)
        found = Quantized(
            unpack_codes(codes, scheme.bits, padded, is_keys=self.is_keys),
            scales.unflatten(-1, shape),
            factors,
        )
        numbers = dequantize(found, scheme, self.width).flatten(2, 3)
        return rotate(numbers) if scheme.rotated else numbers

    def step(self, scales: Tensor, factors: Tensor) -> Tensor:
        """The largest distance of neighbouring numbers in any block, or rounding of an offset."""
        sizes = scales.float().abs() * factors[..., None]
        if not self.scheme.has_zero:
            return sizes.amax() * 32  # of the largest e4m3
        pairs = sizes.unflatten(
            -1, (-1, 2, BLOCK_TOKENS if self.scheme.axis == "token" else padded_width(self.width))
        )
        return torch.maximum(pairs[..., 0, :].amax(), pairs[..., 1, :].amax() * 2.0**-10)

    def packed(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and factors of ``[batch, kv_heads, blocks, 64, width]``."""
        numbers = tokens.to(torch.float32)
        found = quantize(rotate(numbers) if self.scheme.rotated else numbers, self.scheme)
        codes = pack_codes(found.codes, self.scheme.bits, is_keys=self.is_keys)
        return codes, found.scales.flatten(3), found.factors


@final
class _GraphSide:
    """One side in a traced pass."""

    def __init__(self, side: _Side, tensors: Sequence[Tensor], residual: int) -> None:
        self.side = side
        self.codes, self.scales, self.factors, self.tail = tensors
        self.residual = residual

    @property
    def length(self) -> Any:
        return self.codes.shape[2] * BLOCK_TOKENS + self.tail.shape[2]

    def append(self, new: Tensor) -> Tensor:
        """All tokens, the new ones and the tail as they were given; then packs what leaves it."""
        old = self.side.numbers(self.codes, self.scales, self.factors).to(new.dtype)
        whole = torch.cat([self.tail, new], dim=2)
        visible = torch.cat([old, whole], dim=2)
        total = whole.shape[2]
        count = torch.sym_max(0, total - self.residual) // BLOCK_TOKENS
        gone = count * BLOCK_TOKENS
        leaving = whole.narrow(2, 0, gone).unflatten(2, (count, BLOCK_TOKENS))
        codes, scales, factors = self.side.packed(leaving)
        self.codes = _joined(self.codes, codes)
        self.scales = _joined(self.scales, scales)
        self.factors = _joined(self.factors, factors)
        self.tail = whole.narrow(2, gone, total - gone)
        return visible

    def held(self) -> list[Tensor]:
        tail = self.tail.clone(memory_format=torch.contiguous_format)
        return [self.codes, self.scales, self.factors, tail]


@final
class GraphPacked(TokenPart):
    """Keys and values in a traced pass."""

    def __init__(self, keys: _GraphSide, values: _GraphSide) -> None:
        self._keys = keys
        self._values = values

    @property
    def length(self) -> Any:
        return self._keys.length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._keys.append(keys), self._values.append(values)

    def held(self) -> list[Tensor]:
        return [*self._keys.held(), *self._values.held()]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Packed(Part):
    """Every token, the older ones in blocks.

    Args:
        form: how keys and values are stored.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    form: PackedFormat

    kind: ClassVar[str] = "packed"
    keeps_all: ClassVar[bool] = True

    @property
    def _sides(self) -> tuple[_Side, _Side]:
        return (
            _Side(self.form.keys.scheme(self.key_dim), self.key_dim, True),
            _Side(self.form.values.scheme(self.value_dim), self.value_dim, False),
        )

    def slots(self, layer: int, tokens: str) -> list[Slot]:
        found = []
        for name, side in zip(("key", "value"), self._sides, strict=True):
            rows = ("batch", self.kv_heads)
            num_scales = side.scheme.scales_bytes(side.width) // 2
            for what, axes, dtype in (
                ("codes", ("blocks", side.scheme.codes_bytes(side.width)), "uint8"),
                ("scales", ("blocks", num_scales), "float16"),
                ("factors", ("blocks",), "float32"),
                ("tail", ("tail", side.width), ""),
            ):
                slot = f"past_key_values.{layer}.{name}.{what}"
                found.append(Slot(name=slot, layer=layer, axes=(*rows, *axes), dtype=dtype))
        return found

    def sizes(self, num_tokens: int, tokens: str) -> dict[str, int]:
        blocks = self.form.num_blocks(num_tokens)
        return {"blocks": blocks, "tail": num_tokens - blocks * BLOCK_TOKENS}

    def bounds(self, tokens: str) -> dict[str, int]:
        return {"tail": self.form.residual + BLOCK_TOKENS - 1}

    def lengths(self) -> list[int]:
        first = self.form.residual + BLOCK_TOKENS  # so many tokens make a block
        return [first - 1, first, first + 2 * BLOCK_TOKENS + 5]

    def read(self, layer: Any, index: int) -> list[Tensor]:
        tensors = layer.state().tensors
        if "keys" not in tensors:
            raise empty_layer(index)
        found: list[Tensor] = []
        for name, side in zip(("keys", "values"), self._sides, strict=True):
            tail = tensors[name]
            num_codes = side.scheme.codes_bytes(side.width)
            num_scales = side.scheme.scales_bytes(side.width)
            if f"{name}_blocks" in tensors:
                blocks, factors = tensors[f"{name}_blocks"], tensors[f"{name}_factors"]
            else:
                rows = (*tail.shape[:2], 0)
                size = side.scheme.block_bytes(side.width)
                blocks = torch.zeros((*rows, size), dtype=torch.uint8)
                factors = torch.zeros(rows)
            scales = blocks[..., num_codes : num_codes + num_scales].contiguous()
            found += [blocks[..., :num_codes], scales.view(torch.float16), factors, tail]
        return found

    def write(self, layer: Any, tensors: Sequence[Tensor], num_tokens: int) -> None:
        named: dict[str, Tensor] = {}
        schemes: dict[str, Any] = {}
        for name, side, start in zip(("keys", "values"), self._sides, (0, _PER_SIDE), strict=True):
            codes, scales, factors, tail = tensors[start : start + _PER_SIDE]
            named[name], schemes[name] = tail, None
            if not codes.shape[2]:
                continue
            data = scales.contiguous().view(torch.uint8)
            missing = side.scheme.block_bytes(side.width) - codes.shape[-1] - data.shape[-1]
            fill = codes.new_zeros(*codes.shape[:-1], missing)
            named[f"{name}_blocks"] = torch.cat([codes, data, fill], dim=-1)
            named[f"{name}_factors"] = factors
            schemes[name] = side.scheme.facts()
        if not all(bool(torch.isfinite(named[name]).all()) for name in ("keys", "values")) or any(
            not bool(torch.isfinite(factors).all())
            for name, factors in named.items()
            if name.endswith("factors")
        ):
            raise ExportError(
                "The export gave keys or values that are not finite (NaN or infinity), which a "
                "packed cache cannot store. Look for what makes them with a dense export."
            )
        meta = {"num_tokens": num_tokens, "tail": None, "skipped": 0, "schemes": schemes}
        layer.load_state(LayerState(kind=layer.kind, tensors=named, meta=meta))

    def in_graph(self, tensors: Sequence[Tensor], num_seen: Any) -> GraphPacked:
        keys, values = self._sides
        residual = self.form.residual
        return GraphPacked(
            _GraphSide(keys, tensors[:_PER_SIDE], residual),
            _GraphSide(values, tensors[_PER_SIDE:], residual),
        )

    def difference(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Of the tails, and of the numbers behind the blocks beyond two steps of their scale: a
        rounding that falls to the other side, of a code, a scale or an offset, is none."""
        worst = 0.0
        for side, start in zip(self._sides, (0, _PER_SIDE), strict=True):
            mine, others = found[start : start + _PER_SIDE], expected[start : start + _PER_SIDE]
            if any(one.shape != other.shape for one, other in zip(mine, others, strict=True)):
                return float("nan")
            worst = max(worst, _largest(mine[3].double() - others[3].double()))
            if not mine[0].shape[2]:
                continue
            apart = (side.numbers(*mine[:3]) - side.numbers(*others[:3])).abs()
            step = 2 * side.step(others[1], others[2])
            worst = max(worst, _largest((apart - step).clamp(min=0)))
        return worst

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "form": {
                "keys": self.form.keys._asdict(),
                "values": self.form.values._asdict(),
                "residual": self.form.residual,
            },
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Packed":
        form = facts["form"]
        sides = {name: SideFormat(**form[name]) for name in ("keys", "values")}
        return cls(**{**facts, "form": PackedFormat(**sides, residual=int(form["residual"]))})


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Blocks behind blocks. With four axes inductor may lay the result out as it would images, the
    heads innermost, and give it back as if it had not; with three it does not."""
    whole = torch.cat([old.flatten(0, 1), new.flatten(0, 1)], dim=1)
    parted: Tensor = whole.unflatten(0, (old.shape[0], old.shape[1]))
    return parted


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
