"""`add_grc` and `remove_grc`: memories into a model's self-attentions, and out again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self, final

import torch
from torch import nn

from mnemon.errors import LearnedMemoryError
from mnemon.memory.grc.attention import GRCAttention
from mnemon.memory.grc.branch import MemoryBranch
from mnemon.memory.grc.hosts import Host
from mnemon.memory.grc.report import Place, Report
from mnemon.memory.grc.saved import load_branches, save_branches
from mnemon.memory.grc.settings import Rule, Settings, Variant

__all__ = ["GRC", "add_grc", "remove_grc"]


class _Site(NamedTuple):
    name: str
    module: nn.Module
    dim: int
    num_heads: int
    head_dim: int


@final
class GRC:
    """The memories of one model; also a context manager that takes them out at its end.

    Args:
        model: the model.
        report: what was changed.
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        self.model = model
        self.report = report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def branches(self) -> dict[str, MemoryBranch]:
        """What was added and is still there, by the name of its self-attention."""
        found = dict(_installed(self.model))
        return {
            place.name: found[place.name] for place in self.report.places if place.name in found
        }

    def reset(self) -> None:
        """Empties the buffers: zeros, as before training."""
        for branch in self.branches.values():
            branch.cache.cache.zero_()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights and buffers of the memories alone, as a safetensors file.

        Raises:
            LearnedMemoryError: they have been taken out.
            FileError: the file cannot be written.
        """
        save_branches(self.branches, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes weights and buffers from a file of `save`; all of them or none.

        Raises:
            LearnedMemoryError: not such a file, or one of other memories.
        """
        load_branches(self.branches, path)

    def remove(self) -> None:
        """Gives the model back as it was; a second call does nothing."""
        remove_grc(self.model)

    def __str__(self) -> str:
        return str(self.report)


def add_grc(
    model: nn.Module,
    *,
    ratio: float = 0.5,
    memory_length: int = 64,
    variant: Variant = "paper",
    layers: Sequence[int] | None = None,
    initial_lambda: float | None = None,
    rule: Rule = "gated",
    pinned: bool = False,
    synchronise: bool = True,
) -> GRC:
    """Puts a gated recurrent cache into the self-attentions of a model.

        grc = mnemon.memory.add_grc(model, ratio=0.5, memory_length=64)
        print(grc)                       # where, and how many parameters
        ...                              # train: the memories are learned and filled
        grc.remove()                     # the model as it was

    The names of the model's own parameters stay; each self-attention gets a submodule (`grc` in
    transformers' models, `memory` in our own), in its dtype and on its device, in the mode
    (training or not) that it is in. New weights come from torch's random numbers.

    What was saved after training, by ``state_dict``, ``save_pretrained`` or `GRC.save`, is loaded
    into a model to which `add_grc` has given the same memories. Decoders are left alone: their
    first tokens would read a memory made of the last. `RecurrentDecoder` is the one that takes a
    memory, from the segments before.

    Args:
        model: a transformers BERT, BART or ViT, or anything with our own blocks in it.
        ratio: share of the channels that is kept, rounded to whole heads.
        memory_length: slots.
        variant: "paper" or "repo".
        layers: which self-attentions, counted from 0 in the model's order (from the end where
            negative); None: all.
        initial_lambda: where the mixing weights start, before the sigmoid; None: 0 in "paper", -1
            in "repo". float("-inf") leaves the model's outputs as they are.
        rule: "gated", or "fifo" for a cache without gates.
        pinned: never write the buffers.
        synchronise: average buffers over all ranks where torch.distributed runs.

    Raises:
        LearnedMemoryError: a model without such self-attentions, one that has memories already, a
            layer that is not there, or an option outside its bounds. The model is unchanged.
    """
    settings = Settings(
        ratio=ratio,
        memory_length=memory_length,
        variant=variant,
        initial_lambda=initial_lambda,
        rule=rule,
        pinned=pinned,
        synchronise=synchronise,
    )
    there = [name for name, _ in _installed(model)]
    if there:
        raise LearnedMemoryError(
            f"this {type(model).__name__} has memories already (the first in {there[0]}); take "
            "them out with mnemon.memory.remove_grc(model)"
        )
    sites = _chosen(_sites(model), layers)
    before = sum(p.numel() for p in model.parameters())
    made = [_branch(site, settings) for site in sites]
    places = tuple(_place(*pair) for pair in zip(sites, made, strict=True))
    for site, branch in zip(sites, made, strict=True):
        _install(site.module, branch)
    return GRC(
        model,
        Report(
            model=type(model).__name__,
            variant=variant,
            places=places,
            num_parameters_before=before,
        ),
    )


def remove_grc(model: nn.Module) -> None:
    """Takes all memories that `add_grc` has put into a model (or one it was copied from) out."""
    for module in list(model.modules()):
        if isinstance(module, Host) and not isinstance(module, GRCAttention):
            module.memory = None
    if _of_transformers(model):
        from mnemon.hf import grc_sites

        for _, module in list(grc_sites.installed(model)):
            grc_sites.uninstall(module)


def _of_transformers(model: nn.Module) -> bool:
    """Whether a part of it is transformers': importing its models takes a second."""
    return any(
        base.__module__.partition(".")[0] == "transformers"
        for module in model.modules()
        for base in type(module).__mro__
    )


def _installed(model: nn.Module) -> Iterator[tuple[str, MemoryBranch]]:
    for name, module in model.named_modules():
        if isinstance(module, Host) and module.memory is not None:
            if not isinstance(module, GRCAttention):  # that one is born with its memory
                yield name, module.memory
    if _of_transformers(model):
        from mnemon.hf import grc_sites

        for name, module in grc_sites.installed(model):
            branch = module.get_submodule(grc_sites.SUBMODULE)
            assert isinstance(branch, MemoryBranch)
            yield name, branch


def _sites(model: nn.Module) -> list[_Site]:
    found = [
        _Site(name, module, module.dim, module.num_heads, module.dim // module.num_heads)
        for name, module in model.named_modules()
        if isinstance(module, Host) and not isinstance(module, GRCAttention)
    ]
    candidates = "the blocks of mnemon.memory.grc.blocks, and BERT, BART (encoders) and ViT"
    if _of_transformers(model):
        from mnemon.hf import grc_sites

        found += [_Site(*site) for site in grc_sites.find_sites(model)]
        candidates = f"{grc_sites.CANDIDATES}, and the blocks of mnemon.memory.grc.blocks"
    if not found:
        raise LearnedMemoryError(
            f"this {type(model).__name__} has no self-attention that a memory can be put into; "
            f"known: {candidates}"
        )
    return found


def _chosen(sites: list[_Site], layers: Sequence[int] | None) -> list[_Site]:
    if layers is None:
        return sites
    wrong = [index for index in layers if not -len(sites) <= index < len(sites)]
    if wrong or not layers:
        raise LearnedMemoryError(
            f"layers={list(layers)} came; some of 0 to {len(sites) - 1} were expected"
        )
    return [sites[index] for index in sorted({index % len(sites) for index in layers})]


def _branch(site: _Site, settings: Settings) -> MemoryBranch:
    branch = MemoryBranch(site.dim, site.num_heads, settings, head_dim=site.head_dim)
    like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
    if like is not None:
        branch.to(device=like.device, dtype=like.dtype)
    return branch.train(site.module.training)


def _place(site: _Site, branch: MemoryBranch) -> Place:
    cache = branch.cache
    return Place(
        name=site.name,
        kind=type(site.module).__name__,
        num_heads=site.num_heads,
        ratio=cache.kept / cache.dim,
        kept=cache.kept,
        memory_length=cache.memory_length,
        num_parameters=sum(p.numel() for p in branch.parameters()),
        buffer_bytes=cache.cache.numel() * torch.finfo(cache.cache.dtype).bits // 8,
    )


def _install(module: nn.Module, branch: MemoryBranch) -> None:
    if isinstance(module, Host):
        module.memory = branch
        return
    from mnemon.hf import grc_sites

    grc_sites.install(module, branch)
