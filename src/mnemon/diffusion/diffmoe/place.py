"""Puts mixtures of experts into a transformer, takes them out again, and asks all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnemon.diffusion.diffmoe.batch_pool import DiffMoE, Rule
from mnemon.diffusion.diffmoe.expert_choice import ExpertChoice
from mnemon.diffusion.diffmoe.experts import Experts
from mnemon.diffusion.diffmoe.layer import MoELayer, Usage
from mnemon.diffusion.diffmoe.token_choice import TokenChoice
from mnemon.errors import ModelError

__all__ = [
    "KINDS",
    "Call",
    "auxiliary_loss",
    "install",
    "moe_layers",
    "recorded_usage",
    "set_rule",
    "set_training",
    "uninstall",
]

KINDS: Mapping[str, type[MoELayer]] = MappingProxyType(
    {one.kind: one for one in (DiffMoE, TokenChoice, ExpertChoice)}
)


class Call(NamedTuple):
    """One forward of a transformer: the timesteps it was given, and what each layer took."""

    timesteps: Tensor | None
    usage: tuple[Usage, ...]

    @property
    def capacity(self) -> float:
        """Experts per token, the mean over the layers."""
        return sum(one.capacity for one in self.usage) / len(self.usage)


def moe_layers(transformer: nn.Module) -> list[MoELayer]:
    """The mixtures in a transformer, first block first."""
    return [module for module in transformer.modules() if isinstance(module, MoELayer)]


def install(
    transformer: nn.Module,
    kind: str = "diffmoe",
    *,
    num_experts: int = 8,
    capacity: float = 1.0,
    every: int = 2,
    blocks: Sequence[int] | None = None,
    from_dense: bool = False,
    seed: int = 0,
) -> list[MoELayer]:
    """Puts experts in the place of feed-forwards, each as wide as the one it replaces.

    Args:
        transformer: has `transformer_blocks`, whose `ff` is diffusers' `FeedForward` with GELU.
        kind: a key of `KINDS`.
        num_experts: N.
        capacity: experts per token on average.
        every: of so many blocks the last one; 2 is every second block, from the second on.
        blocks: numbers of the blocks, instead of `every`.
        from_dense: whether each expert begins as a copy of the feed-forward; fresh otherwise.
        seed: of the fresh weights.

    Returns:
        the new layers; in training mode where the feed-forward was.

    Raises:
        ModelError: no such kind, no such blocks, another feed-forward, or experts are already
            there. The transformer is then unchanged.
    """
    if kind not in KINDS:
        raise ModelError(f"kind {kind!r} came; expected one of {', '.join(KINDS)}")
    if num_experts < 1 or every < 1:
        raise ModelError(
            f"num_experts {num_experts} and every {every} came; expected both to be at least 1"
        )
    if moe_layers(transformer):
        raise ModelError("this transformer has experts already; uninstall(transformer) first")
    all_blocks = _blocks(transformer)
    places = range(every - 1, len(all_blocks), every) if blocks is None else blocks
    if not places or not all(0 <= place < len(all_blocks) for place in places):
        raise ModelError(
            f"blocks {list(places)} were asked for; expected some of 0 .. {len(all_blocks) - 1}"
        )
    made: list[tuple[Any, MoELayer]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place in places:
            block = all_blocks[place]
            experts = Experts.like(block.ff, num_experts, copy=from_dense)
            layer = KINDS[kind](experts, capacity=capacity)
            weight = experts.weight_in
            layer.to(weight.device, weight.dtype).train(block.ff.training)
            layer.replaced = (block.ff,)
            made.append((block, layer))
    for block, layer in made:
        block.ff = layer
    return [layer for _, layer in made]


def uninstall(transformer: nn.Module) -> None:
    """Puts the feed-forwards back that `install` replaced; without experts nothing happens.

    Raises:
        ModelError: the model was loaded with its experts, so that none was replaced.
    """
    found = [block for block in _blocks(transformer) if isinstance(block.ff, MoELayer)]
    if not all(block.ff.replaced for block in found):
        raise ModelError("this model was loaded with its experts; it has no feed-forwards to go to")
    for block in found:
        weight = block.ff.experts.weight_in
        (block.ff,) = block.ff.replaced
        block.ff.to(weight.device, weight.dtype)


def auxiliary_loss(transformer: nn.Module) -> Tensor:
    """The sum of the layers' losses of the last forward in training; they are then forgotten.

    Zero where there are none: of expert choice, of a dense model, and after an evaluation.
    """
    total = next(transformer.parameters()).new_zeros(())
    for layer in moe_layers(transformer):
        if layer.auxiliary is not None:
            total = total + layer.auxiliary
            layer.auxiliary = None
    return total


def set_training(transformer: nn.Module, training: bool = True) -> None:
    """Training mode for the experts alone.

    A DiT in training mode drops labels, other ones in each block, so it often trains in evaluation
    mode.
    """
    for layer in moe_layers(transformer):
        layer.train(training)


def set_rule(
    transformer: nn.Module, rule: Rule = "topk", *, tau_scale: float = 1.0, tau_offset: float = 0.0
) -> None:
    """How DiffMoE's experts choose in inference; see `DiffMoE`.

    Raises:
        ModelError: another rule, or no DiffMoE in this model.
    """
    if rule not in ("topk", "threshold"):
        raise ModelError(f"rule {rule!r} came; expected 'topk' or 'threshold'")
    layers = [layer for layer in moe_layers(transformer) if isinstance(layer, DiffMoE)]
    if not layers:
        raise ModelError("this transformer has no DiffMoE layers; install(transformer) first")
    for layer in layers:
        layer.rule, layer.tau_scale, layer.tau_offset = rule, tau_scale, tau_offset


@contextlib.contextmanager
def recorded_usage(transformer: nn.Module) -> Iterator[list[Call]]:
    """A list that gains one `Call` with each forward of the transformer."""
    layers = moe_layers(transformer)
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        steps = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        calls.append(Call(steps, tuple(layer.usage for layer in layers if layer.usage)))

    handle = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _blocks(transformer: nn.Module) -> list[Any]:
    blocks = getattr(transformer, "transformer_blocks", None)
    if blocks is None or not all(hasattr(block, "ff") for block in blocks):
        raise ModelError(
            f"a {type(transformer).__name__} came; expected a transformer whose "
            "transformer_blocks have a feed-forward ff, as DiTTransformer2DModel has"
        )
    return list(blocks)
