"""The names of what a diffusion transformer runs, so that caching knows where to attach.

Three levels: a stack is a list of blocks that the model runs one after the other, a block adds to
the hidden states what its sublayers return, a sublayer is an attention or an MLP. A model is looked
up by the name of its class; one that is not in the table is searched for the usual names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mnemon.errors import NoSites

__all__ = ["Block", "Kind", "Passed", "Sites", "Stack", "Sublayer", "find_sites"]

Kind = Literal["attention", "cross_attention", "mlp"]
Passed = Literal["positional", "keyword"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """An attention or an MLP whose output its block has yet to multiply with a gate.

    It is called once in every forward of the transformer, and returns a tensor or, where one
    attention serves image and text, a tuple of them (None among them at the end of SD3).

    Args:
        path: dotted name, from the transformer.
        kind: what it is.
        block: running number of its block, over all stacks.
        per_token: known to treat every token of ``(batch, tokens, channels)`` alone, so that it
            may be run on some of them.
    """

    path: str
    kind: Kind
    block: int
    per_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of a stack.

    Args:
        path: dotted name, from the transformer.
        index: running number, over all stacks.
        sublayers: in the order in which it runs them (in an unknown model: has them).
    """

    path: str
    index: int
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Blocks that the model runs one after the other, each on what the one before returned.

    In an unknown model the last three are empty: only its sublayers can be attached to.

    Args:
        name: dotted name of the ModuleList.
        blocks: its blocks.
        hidden: the parameters of a block's forward that carry hidden states, in the order of the
            parameters.
        returns: the same names, in the order in which the block returns them; a single one is
            returned bare, several as a tuple.
        passed: how the model passes them. Under gradient checkpointing all pass by position.
    """

    name: str
    blocks: tuple[Block, ...]
    hidden: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    passed: Passed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Where caching can attach in one model.

    Args:
        model: the name of its class.
        stacks: in the order in which the model runs them.
    """

    model: str
    stacks: tuple[Stack, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(sublayer for block in self.blocks for sublayer in block.sublayers)


def find_sites(transformer: nn.Module) -> Sites:
    """The stacks, blocks and sublayers of `transformer`.

    Raises:
        NoSites: a known model that is not built as expected, or an unknown one in which no
            ModuleList holds blocks of one class with children of the usual names.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in _KNOWN:
            return _known_sites(transformer, _KNOWN[base.__name__])
    return _usual_sites(transformer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A row of the table: `sublayers` in the order in which a block runs them, if it has them."""

    name: str
    sublayers: Mapping[str, Kind]
    returns: tuple[str, ...] = ("hidden_states",)
    passed: Passed
    per_token: bool = True

    @property
    def hidden(self) -> tuple[str, ...]:
        return tuple(name for name in _IMAGE_TEXT if name in self.returns)


_IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")  # the order of the parameters, always
_TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")

_CROSS: Mapping[str, Kind] = {"attn1": "attention", "attn2": "cross_attention", "ff": "mlp"}
_CROSS_FFN: Mapping[str, Kind] = {"attn1": "attention", "attn2": "cross_attention", "ffn": "mlp"}
_JOINT: Mapping[str, Kind] = {"attn": "attention", "ff": "mlp", "ff_context": "mlp"}
# The two halves of what `proj_out` takes, concatenated; `proj_mlp` comes before the activation, and
# is wider than the model. The gate is applied to what `proj_out` returns.
_PARALLEL: Mapping[str, Kind] = {"proj_mlp": "mlp", "attn": "attention"}

# Read in diffusers 0.42.1; tests/diffusion/test_sites.py runs every one of them.
_KNOWN: Mapping[str, tuple[_Known, ...]] = {
    "AllegroTransformer3DModel": (
        _Known(name="transformer_blocks", sublayers=_CROSS, passed="keyword"),
    ),
    # Norm and MLP take residual + gate * attention, but it is the residual without the attention to
    # which the MLP's output is added: an attention matters only through the MLP behind it. Between
    # the stacks the two streams become one, text in front.
    "AuraFlowTransformer2DModel": (
        _Known(
            name="joint_transformer_blocks", sublayers=_JOINT, returns=_TEXT_IMAGE, passed="keyword"
        ),
        _Known(
            name="single_transformer_blocks",
            sublayers={"attn": "attention", "ff": "mlp"},
            passed="keyword",
        ),
    ),
    # Between the stacks the two streams become one, text in front.
    "ChromaTransformer2DModel": (
        _Known(name="transformer_blocks", sublayers=_JOINT, returns=_TEXT_IMAGE, passed="keyword"),
        _Known(name="single_transformer_blocks", sublayers=_PARALLEL, passed="keyword"),
    ),
    # `ff` is left out: a block calls it twice, for the image and for the text.
    "CogView4Transformer2DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn1": "attention"},
            returns=_IMAGE_TEXT,
            passed="positional",
        ),
    ),
    # `attn1` returns a pair, image first; `ff` takes both at once, text in front.
    "CogVideoXTransformer3DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn1": "attention", "ff": "mlp"},
            returns=_IMAGE_TEXT,
            passed="keyword",
        ),
    ),
    # What follows the blocks reads transformer_blocks[0].norm1.emb.
    "DiTTransformer2DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn1": "attention", "ff": "mlp"},
            passed="positional",
        ),
    ),
    "FluxTransformer2DModel": (
        _Known(name="transformer_blocks", sublayers=_JOINT, returns=_TEXT_IMAGE, passed="keyword"),
        # Both streams go in and come out; a block joins and splits them itself.
        _Known(
            name="single_transformer_blocks",
            sublayers=_PARALLEL,
            returns=_TEXT_IMAGE,
            passed="keyword",
        ),
    ),
    # In a single block `attn` is attention and MLP in one. Between the stacks the two streams
    # become one, text in front.
    "Flux2Transformer2DModel": (
        _Known(name="transformer_blocks", sublayers=_JOINT, returns=_TEXT_IMAGE, passed="keyword"),
        _Known(name="single_transformer_blocks", sublayers={"attn": "attention"}, passed="keyword"),
    ),
    # No gates. Long skips: beyond the middle, block n - 1 - i is also given what block i returned,
    # as `skip`, and mixes it into the hidden states before anything else.
    "HunyuanDiT2DModel": (_Known(name="blocks", sublayers=_CROSS, passed="positional"),),
    # The refiner of the text (context_embedder) is left out.
    "HunyuanVideoTransformer3DModel": (
        _Known(
            name="transformer_blocks", sublayers=_JOINT, returns=_IMAGE_TEXT, passed="positional"
        ),
        # Here `attn` returns a pair, image first, and `proj_mlp` takes text behind the image.
        _Known(
            name="single_transformer_blocks",
            sublayers=_PARALLEL,
            returns=_IMAGE_TEXT,
            passed="positional",
        ),
    ),
    "LTXVideoTransformer3DModel": (
        _Known(name="transformer_blocks", sublayers=_CROSS, passed="keyword"),
    ),
    # Text and image in one sequence, whose length is that of the longest prompt of the call. What
    # the sublayers return is normalized before its gate. The refiners are left out: two blocks for
    # the image, and two for the text, which do the same in every step.
    "Lumina2Transformer2DModel": (
        _Known(
            name="layers",
            sublayers={"attn": "attention", "feed_forward": "mlp"},
            passed="positional",
        ),
    ),
    # What the sublayers return is normalized before its gate. The last block returns the text as
    # it came, and has no `ff_context`.
    "MochiTransformer3DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn1": "attention", "ff": "mlp", "ff_context": "mlp"},
            returns=_IMAGE_TEXT,
            passed="keyword",
        ),
    ),
    # Alpha and Sigma. The cross-attention has no gate and no norm before it.
    "PixArtTransformer2DModel": (
        _Known(name="transformer_blocks", sublayers=_CROSS, passed="positional"),
    ),
    # Nobody reads the text that the last block returns, so its `txt_mlp` is for nothing.
    "QwenImageTransformer2DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn": "attention", "img_mlp": "mlp", "txt_mlp": "mlp"},
            returns=_TEXT_IMAGE,
            passed="keyword",
        ),
    ),
    # `ff` convolves over the image, (batch, channels, height, width): no token stands alone.
    "SanaTransformer2DModel": (
        _Known(name="transformer_blocks", sublayers=_CROSS, passed="positional", per_token=False),
    ),
    # `attn2` is a second self-attention, in the first blocks of 3.5 medium. The last block has no
    # `ff_context` and returns None for the text.
    "SD3Transformer2DModel": (
        _Known(
            name="transformer_blocks",
            sublayers={"attn": "attention", "attn2": "attention", "ff": "mlp", "ff_context": "mlp"},
            returns=_TEXT_IMAGE,
            passed="keyword",
        ),
    ),
    "SkyReelsV2Transformer3DModel": (
        _Known(name="blocks", sublayers=_CROSS_FFN, passed="positional"),
    ),
    "WanTransformer3DModel": (_Known(name="blocks", sublayers=_CROSS_FFN, passed="positional"),),
}

_USUAL: Mapping[str, Kind] = {
    **dict.fromkeys(("attn", "attn1", "self_attn", "self_attention", "attention"), "attention"),
    **dict.fromkeys(("attn2", "attn3", "cross_attn", "cross_attention"), "cross_attention"),
    **dict.fromkeys(
        ("ff", "ffn", "ff_context", "feed_forward", "mlp", "proj_mlp", "img_mlp", "txt_mlp"), "mlp"
    ),
}


def _known_sites(transformer: nn.Module, known: tuple[_Known, ...]) -> Sites:
    stacks: list[Stack] = []
    first = 0
    for row in known:
        modules = getattr(transformer, row.name, None)
        if not isinstance(modules, nn.ModuleList):
            raise _no_sites(transformer, row.name, row.sublayers)
        blocks = _blocks(row.name, modules, row.sublayers, first, row.per_token)
        if blocks is None:
            raise _no_sites(transformer, row.name, row.sublayers)
        first += len(blocks)
        stacks.append(
            Stack(
                name=row.name,
                blocks=blocks,
                hidden=row.hidden,
                returns=row.returns,
                passed=row.passed,
            )
        )
    if not first:
        raise _no_sites(transformer, known[0].name, known[0].sublayers)
    return Sites(model=type(transformer).__name__, stacks=tuple(stacks))


def _usual_sites(transformer: nn.Module) -> Sites:
    stacks: list[Stack] = []
    first = 0
    for name, modules in _lists(transformer):
        if any(name.startswith(f"{stack.name}.") for stack in stacks):
            continue  # within a block of a stack
        if len({type(module) for module in modules}) != 1:
            continue
        names = {
            child: _USUAL[child] for child, _ in modules[0].named_children() if child in _USUAL
        }
        blocks = _blocks(name, modules, names, first, False)
        if blocks is not None:
            first += len(blocks)
            stacks.append(Stack(name=name, blocks=blocks))
    if not stacks:
        raise _no_sites(transformer, "any ModuleList of blocks of one class", _USUAL)
    return Sites(model=type(transformer).__name__, stacks=tuple(stacks))


def _blocks(
    name: str, modules: nn.ModuleList, names: Mapping[str, Kind], first: int, per_token: bool
) -> tuple[Block, ...] | None:
    """The blocks, or None where one of them has none of the sublayers."""
    blocks: list[Block] = []
    for number, module in enumerate(modules):
        path, index = f"{name}.{number}", first + number
        children = dict(module.named_children())
        sublayers = tuple(
            Sublayer(
                path=f"{path}.{child}",
                kind=kind,
                block=index,
                per_token=per_token
                and kind == "mlp"
                and not getattr(children[child], "needs_batch", False),
            )
            for child, kind in names.items()
            if child in children
        )
        if not sublayers:
            return None
        blocks.append(Block(path=path, index=index, sublayers=sublayers))
    return tuple(blocks)


def _lists(transformer: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, module


def _no_sites(transformer: nn.Module, where: str, names: Mapping[str, Kind]) -> NoSites:
    found = "; ".join(
        f"{name} ({len(modules)} x {type(modules[0]).__name__}: "
        f"{', '.join(child for child, _ in modules[0].named_children()) or 'no children'})"
        for name, modules in _lists(transformer)
    )
    return NoSites(
        f"Found nothing to attach a cache to in a {type(transformer).__name__}: looked in {where} "
        f"for blocks with children named {', '.join(names)}; the model's ModuleLists are: "
        f"{found or 'none'}. Pass the transformer of the pipeline itself (pipe.transformer)."
    )
