"""Whether a model goes on from a recurrent state when it is fed several tokens at once.

Some of transformers' models (Mamba, Jamba; 5.23) read their state only when fed one token: given
more, they silently begin from an empty one. That shows in a measurement, not in a declaration.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from mnemon.cache import Cache
from mnemon.hf import generate as hf
from mnemon.layers import HybridLayer, RecurrentLayer

__all__ = ["continues_states", "keeps_states"]

_NUM_BEFORE = 5
_NUM_AFTER = 3


def continues_states(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether `model` may be fed several tokens on top of what `cache` holds.

    True at once for a cache without recurrent states. Otherwise two short forwards are compared
    that differ in nothing but the states they begin from: the same bits mean that nobody read them.
    """
    layers = list(_recurrent(cache))
    if not layers or (cache.num_tokens and not any(_states(layer) for layer in layers)):
        return True
    with torch.no_grad():
        device = model.device
        ids = torch.arange(3, 3 + _NUM_BEFORE + _NUM_AFTER, device=device)[None]
        first = Cache(cache.config, cache.recipe)
        _forward(model, ids[:, :_NUM_BEFORE], first)
        changed = first.fork()
        if not any(_states(layer) for layer in _recurrent(changed)):
            return True  # short convolutions only: the cache joins their columns itself
        for layer in _recurrent(changed):
            for index, state in _states(layer).items():
                layer.update_recurrent_state(torch.full_like(state, 2.0), index)
        try:
            logits = [_forward(model, ids[:, _NUM_BEFORE:], one) for one in (first, changed)]
        except (IndexError, RuntimeError):
            return False  # Mamba in 5.14 takes one token at a time and says so in this way
        return not torch.equal(logits[0], logits[1])


def keeps_states(cache: Cache) -> bool:
    """Whether a layer of `cache` keeps a recurrent or convolution state."""
    return any(True for _ in _recurrent(cache))


def _forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    outputs = model(
        input_ids=ids, use_cache=True, return_dict=True, **{hf.stream(model).cache: cache}
    )
    result: torch.Tensor = outputs[0]
    return result


def _recurrent(cache: Cache) -> Iterator[RecurrentLayer]:
    for layer in cache.layers:
        part = layer.recurrent if isinstance(layer, HybridLayer) else layer
        if isinstance(part, RecurrentLayer):
            yield part


def _states(layer: RecurrentLayer) -> dict[int, torch.Tensor]:
    states = {index: layer.recurrent_state(index) for index in range(layer.num_states)}
    return {index: state for index, state in states.items() if state is not None}
