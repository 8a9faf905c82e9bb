"""Multiply-accumulates of a transformer and its parts, counted without computing anything."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mnemon.diffusion.sites import Sites

__all__ = ["Macs", "Shape", "count_macs", "shapes_of"]


_MASK = 1 << 16


class Shape(NamedTuple):
    """A tensor that is not there."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor | None = None  # of masks and indices: lengths may depend on them


@dataclass(frozen=True, slots=True, kw_only=True)
class Macs:
    """Of one evaluation: the model, each block, each sublayer, each block but for its sublayers."""

    total: int
    blocks: tuple[int, ...]
    sublayers: tuple[int, ...]
    around: tuple[int, ...]

    def spent(self, blocks: Sequence[float], sublayers: Sequence[float]) -> int:
        """What is computed when these shares of blocks and of sublayers are.

        A block that is left out also saves what it has besides its sublayers.
        """
        cost = self.total - sum(self.blocks)
        inside = sum(m * share for m, share in zip(self.sublayers, sublayers, strict=True))
        around = sum(m * share for m, share in zip(self.around, blocks, strict=True))
        return cost + round(inside + around)


def shapes_of(value: Any) -> Any:
    """The same nest with a `Shape` for every tensor."""
    if isinstance(value, Tensor):
        small = not value.is_floating_point() and value.numel() <= _MASK
        kept = value.detach().clone() if small else None
        return Shape(tuple(value.shape), value.stride(), value.dtype, kept)
    if isinstance(value, Mapping):
        return {key: shapes_of(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(shapes_of(part) for part in value)
    return value


def _filled(value: Any, device: torch.device) -> Any:
    if isinstance(value, Shape):
        if value.values is not None and device.type != "meta":
            return value.values
        made = torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device=device)
        return made if device.type == "meta" else made.fill_(1)
    if isinstance(value, Mapping):
        return {key: _filled(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(part, device) for part in value)
    return value


@contextlib.contextmanager
def _unattached(model: nn.Module) -> Iterator[None]:
    """The modules' own forwards, whatever was put before them on the instances."""
    put: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name in ("forward", "_compiled_call_impl"):
            if module.__dict__.get(name) is not None:
                put.append((module, name, module.__dict__.pop(name)))
    try:
        yield
    finally:
        for module, name, value in put:
            module.__dict__[name] = value


def count_macs(model: nn.Module, sites: Sites, arguments: Mapping[str, Any]) -> Macs:
    """Counts matrix products, convolutions and attention; element-wise work is not counted.

    Args:
        model: a transformer; its weights are not touched.
        sites: its sublayers.
        arguments: of a forward call, tensors replaced by `shapes_of`.

    Raises:
        RuntimeError: the model cannot be run with numbers that mean nothing.
    """
    with _unattached(model):
        try:
            with torch.device("meta"):
                flops = _run(_ghost(model), arguments, torch.device("meta"))
        except (RuntimeError, NotImplementedError):
            # It looks at values (the lengths in a mask): run once in earnest.
            flops = _run(model, arguments, next(model.parameters()).device)
    root = type(model).__name__

    def of(path: str) -> int:
        return int(sum(flops.get(f"{root}.{path}", {}).values())) // 2

    blocks = tuple(of(block.path) for block in sites.blocks)
    around = tuple(
        whole - sum(of(s.path) for s in block.sublayers)
        for whole, block in zip(blocks, sites.blocks, strict=True)
    )
    return Macs(
        total=sum(flops["Global"].values()) // 2,
        blocks=blocks,
        sublayers=tuple(of(s.path) for s in sites.sublayers),
        around=around,
    )


def _attention(queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(queries, keys, values))


def _run(model: nn.Module, arguments: Mapping[str, Any], device: torch.device) -> Any:
    # torch has no formula for the attention that it runs on a CPU, and would count nothing.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=on_cpu)
    counter.depth = 10**6  # of modules within modules
    with torch.no_grad(), counter:
        model(**_filled(arguments, device))
    return counter.get_flop_counts()


def _ghost(model: nn.Module) -> nn.Module:
    """The model on the meta device, without copying a single weight."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied
