"""Where a gated recurrent cache goes into transformers' BERT, BART and ViT.

A self-attention gets a submodule `grc` and the class below that calls it. Classes, not wrappers on
the instance: copies, pickles and compiled code find them. What a module's names and calls are in
transformers is written here and nowhere else; a module that has not these names is no site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart import modeling_bart
from transformers.models.bert import modeling_bert
from transformers.models.vit import modeling_vit

__all__ = ["CANDIDATES", "SUBMODULE", "Site", "find_sites", "install", "installed", "uninstall"]

SUBMODULE = "grc"
CANDIDATES = "BERT (as an encoder), BART (its encoder) and ViT of transformers"


class Site(NamedTuple):
    """A self-attention that can take a memory.

    Args:
        name: dotted, within the model.
        module: the self-attention.
        dim: channels of its input.
        num_heads: heads.
        head_dim: channels of a head's output.
    """

    name: str
    module: nn.Module
    dim: int
    num_heads: int
    head_dim: int


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of `model`, in the order in which they are registered; none in other models."""
    return [
        Site(name, module, *_sizes(module))
        for name, module in model.named_modules()
        if type(module) in _WITH and _fits(module)
    ]


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of `model` that have a memory."""
    for name, module in model.named_modules():
        if type(module) in _WITHOUT:
            yield name, module


def install(module: nn.Module, memory: nn.Module) -> None:
    """Gives a site its memory, which is called with input, attended, real tokens and grid."""
    module.add_module(SUBMODULE, memory)
    module.__class__ = _WITH[type(module)]


def uninstall(module: nn.Module) -> None:
    """Makes a site what it was."""
    module.__class__ = _WITHOUT[type(module)]
    delattr(module, SUBMODULE)


def _sizes(module: Any) -> tuple[int, int, int]:
    """Channels of the input, heads, channels of a head."""
    first = module.query if isinstance(module, modeling_bert.BertSelfAttention) else module.q_proj
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    return first.in_features, heads, first.out_features // heads


def _fits(module: nn.Module) -> bool:
    """Whether a module has the names used here, and every token sees every other."""
    names = _NAMES[type(module)]
    if not all(hasattr(module, name) for name in names):
        return False  # another release
    if "config" in names and not hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return False  # so are 4.57's BART and ViT
    # A memory made of a whole text must not be read by its first tokens where they predict it.
    return not (getattr(module, "is_decoder", False) or module.is_causal)


def _real(mask: Any, hidden_states: Tensor) -> Tensor | None:
    """Which tokens any query may see, from each implementation's kind of mask.

    None: all. ``(batch, tokens)``, 1 at real ones: flash attention. ``(batch, 1 or heads, queries,
    keys)``, boolean or to be added: sdpa and eager. A function of places: flex attention.
    """
    if mask is None:
        return None
    batch, length, device = *hidden_states.shape[:2], hidden_states.device
    if hasattr(mask, "mask_mod"):
        rows = torch.arange(batch, device=device)[:, None]
        keys = torch.arange(length, device=device)[None, :]
        first = torch.zeros((), dtype=torch.long, device=device)
        seen: Tensor = mask.mask_mod(rows, first, first, keys)
        return seen.expand(batch, length)
    if mask.dim() == 2:
        return _boolean(mask)
    found = _boolean(mask).flatten(1, 2).any(dim=1)
    return found.expand(batch, -1)


def _boolean(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask.bool()


@final
class GRCBertSelfAttention(modeling_bert.BertSelfAttention):
    """BERT's self-attention, whose output is not projected yet, with a memory."""

    grc: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, the memory mixed into the output."""
        found: Any = super().forward(hidden_states, attention_mask, *args, **kwargs)
        attended, weights = found
        real = _real(attention_mask, hidden_states)
        return self.grc(hidden_states, attended, real, None), weights


def _attend(
    module: Any, hidden_states: Tensor, mask: Any, dropout: float, eager: Any, kwargs: Any
) -> tuple[Tensor, Any]:
    """The self-attention of BART and ViT up to its projection, by the model's implementation."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    heads = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    name = module.config._attn_implementation
    function = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    attended, weights = function(
        module,
        *heads,
        mask,
        dropout=dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return attended.reshape(*hidden_states.shape[:-1], -1), weights


@final
class GRCBartAttention(modeling_bart.BartAttention):
    """The self-attention of BART's encoder with a memory."""

    grc: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, the memory mixed in before the projection."""
        assert key_value_states is None, "the encoder's attention is to itself"
        assert past_key_values is None, "the encoder keeps no keys"
        attended, weights = _attend(
            self,
            hidden_states,
            attention_mask,
            self.dropout,
            modeling_bart.eager_attention_forward,
            kwargs,
        )
        real = _real(attention_mask, hidden_states)
        return self.out_proj(self.grc(hidden_states, attended, real, None)), weights


@final
class GRCViTAttention(modeling_vit.ViTAttention):
    """ViT's self-attention with a memory."""

    grc: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, the memory mixed in before the projection."""
        attended, weights = _attend(
            self,
            hidden_states,
            attention_mask,
            self.attention_dropout,
            modeling_vit.eager_attention_forward,
            kwargs,
        )
        real = _real(attention_mask, hidden_states)
        grid = self._grid(hidden_states.shape[1])
        return self.o_proj(self.grc(hidden_states, attended, real, grid)), weights

    def _grid(self, length: int) -> tuple[int, int, int] | None:
        """Height, width and the class token; None for images of another size than the config's."""
        sides = (_pair(self.config.image_size), _pair(self.config.patch_size))
        height, width = (image // patch for image, patch in zip(*sides, strict=True))
        return (height, width, 1) if length == height * width + 1 else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


_WITH: Mapping[type, Any] = {
    modeling_bert.BertSelfAttention: GRCBertSelfAttention,
    modeling_bart.BartAttention: GRCBartAttention,
    modeling_vit.ViTAttention: GRCViTAttention,
}
_WITHOUT: Mapping[type, Any] = {new: old for old, new in _WITH.items()}
_PROJECTED = ("q_proj", "k_proj", "v_proj", "head_dim", "scaling", "config", "is_causal")
_NAMES: Mapping[type, tuple[str, ...]] = {
    modeling_bert.BertSelfAttention: ("query", "num_attention_heads", "is_causal"),
    modeling_bart.BartAttention: (*_PROJECTED, "out_proj", "num_heads", "dropout"),
    modeling_vit.ViTAttention: (*_PROJECTED, "o_proj", "num_attention_heads", "attention_dropout"),
}
