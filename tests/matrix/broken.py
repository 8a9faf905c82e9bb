"""A cache with a small, realistic bug: the matrix must notice it, or it proves nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .modes import mnemon_cache

#: The broken cache forgets the last token of every block of so many. (A decoder behind an encoder
#: sees fewer tokens.)
BLOCK, DECODER_BLOCK = 5, 3


def forgetful_cache(model: Any, recipe: str) -> Any:
    """A mnemon cache in which keys and values at the end of a block are zero.

    Layers with states lose half of their recurrent state and the next to last column of their
    convolution state, once.
    """
    cache = mnemon_cache(model, recipe)
    paired = model.config.is_encoder_decoder
    target = cache.self_attention_cache if paired else cache
    _forget_ends_of_blocks(target, DECODER_BLOCK if paired else BLOCK)
    _damage_states(target)
    return cache


def _forget_ends_of_blocks(cache: Any, block: int) -> None:
    update = cache.update
    num_seen: dict[int, int] = {}

    def forgetful(
        keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start = num_seen.get(layer_idx, 0)
        num_seen[layer_idx] = start + keys.shape[-2]
        kept = torch.arange(start, start + keys.shape[-2]) % block != block - 1
        keys, values = keys * kept[:, None], values * kept[:, None]
        result: tuple[Tensor, Tensor] = update(keys, values, layer_idx, *args, **kwargs)
        return result

    cache.update = forgetful


def _damage_states(cache: Any) -> None:
    update_conv, update_recurrent = cache.update_conv_state, cache.update_recurrent_state
    conv_done: set[int] = set()
    recurrent_done: set[int] = set()

    def conv(states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        if layer_idx not in conv_done and states.shape[-1] > 2:
            conv_done.add(layer_idx)
            states = states.clone()
            states[..., -2] = states[..., -3]
        result: Tensor = update_conv(states, layer_idx, *args, **kwargs)
        return result

    def recurrent(states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        if layer_idx not in recurrent_done:
            recurrent_done.add(layer_idx)
            states = states * 0.5
        result: Tensor = update_recurrent(states, layer_idx, *args, **kwargs)
        return result

    cache.update_conv_state, cache.update_recurrent_state = conv, recurrent
