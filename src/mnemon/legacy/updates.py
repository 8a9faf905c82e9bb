"""`update` as old attention calls it, and caches made without arguments."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import __version__, cache_utils

from mnemon.errors import CacheError
from mnemon.layers.base import CacheLayer
from mnemon.legacy.callers import is_remote, old_code_calls
from mnemon.legacy.hosts import ROOT, is_mnemon, replace_everywhere
from mnemon.legacy.patches import Patches
from mnemon.legacy.views import waiting
from mnemon.legacy.warning import Notices
from mnemon.names import lookup

__all__ = ["install"]


def install(patches: Patches, notices: Notices) -> None:
    native = lookup("cache_kwargs").there_in(__version__)
    replace_everywhere(patches, "update", lambda own: _update(own, notices, native))
    patches.put(ROOT, "__init__", functools.wraps(ROOT.__init__)(_init(ROOT.__init__)))


def _init(own: Callable[..., None]) -> Callable[..., None]:
    """Old subclasses, which keep lists of their own, call ``super().__init__()``."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not args and not kwargs and is_remote(type(self)):
            own(self, layers=[])
        else:
            own(self, *args, **kwargs)

    return __init__


def _update(own: Callable[..., Any], notices: Notices, native: bool) -> Callable[..., Any]:
    """`update` that knows where a preallocated layer is to write, and when it must not."""

    def update(
        self: Any, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        given = args[0] if args else kwargs.get("cache_kwargs")
        if not native and (given is not None or kwargs) and old_code_calls():
            notices.give("cache_kwargs")
        position = kwargs.get("cache_position")
        if position is None and isinstance(given, dict):
            position = given.get("cache_position")
        if layer_idx < len(self.layers):
            layer = self.layers[layer_idx]
            if waiting(layer):
                raise CacheError(
                    f"Layer {layer_idx}: key_cache and value_cache were given tensors of different "
                    "lengths. Assign both before the next update()."
                )
            if position is not None and (is_mnemon(self) or not native):
                _go_to(layer, position, layer_idx)
        return own(self, key_states, value_states, layer_idx, *args, **kwargs)

    return update


def _go_to(layer: Any, position: torch.Tensor, index: int) -> None:
    """Let a preallocated layer write at `position`, as it did when that was an argument.

    Layers that grow never looked at it. Asking a tensor costs a wait for the device, so a layer
    that is being compiled is not asked.
    """
    if not layer.is_compileable or not layer.is_initialized or torch.compiler.is_compiling():
        return
    first = int(position.reshape(-1)[0])
    held = int(layer.num_tokens if isinstance(layer, CacheLayer) else layer.get_seq_length())
    if first == held:
        return
    if isinstance(layer, CacheLayer) and 0 <= first < held and layer.can_crop(held - first):
        layer.crop(held - first)
    elif first == 0:
        layer.reset()
    elif type(layer) is cache_utils.StaticLayer and first >= 0:
        layer.cumulative_length.fill_(first)
    else:
        raise CacheError(
            f"Layer {index} holds {held} tokens and was told to write at cache_position {first}, "
            f"which a {type(layer).__name__} cannot do: write at {held}, or at 0 to begin anew."
        )
