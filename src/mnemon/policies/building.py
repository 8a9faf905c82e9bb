"""From a recipe to the layers of a cache: strings become policies here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mnemon import layers as kinds
from mnemon.bounds import Bound
from mnemon.errors import RecipeError
from mnemon.hf.kinds import LayerSpec
from mnemon.layers import CacheLayer, HybridLayer
from mnemon.policies.base import Policy
from mnemon.policies.h2o import H2O
from mnemon.policies.layer import PolicyLayer
from mnemon.policies.random import Random
from mnemon.policies.tova import Tova
from mnemon.policies.window_sinks import WindowSinks
from mnemon.recipe import Recipe

__all__ = ["build_all", "policy_of"]

_Options = Mapping[str, int | float | str]

#: By the name of the term that says how much stays; the recipe's parser checked the options.
_POLICIES: Final[Mapping[str, Callable[[Bound, _Options], Policy]]] = {
    "window": lambda bound, options: WindowSinks(bound=bound),
    "random": lambda bound, options: Random(bound=bound, seed=int(options.get("seed", 0))),
    "h2o": lambda bound, options: H2O(bound=bound, recent=float(options.get("recent", 0.5))),
    "tova": lambda bound, options: Tova(bound=bound),
}


def policy_of(recipe: Recipe) -> Policy | None:
    """The policy that a recipe names; None where every token stays or the model decides."""
    bound = recipe.bound
    if bound is None:
        return None
    (main,) = (term for term in recipe.policies if term.name in _POLICIES)
    return _POLICIES[main.name](bound, dict(main.options))


def build_all(specs: Sequence[LayerSpec], recipe: Recipe) -> list[CacheLayer]:
    """The empty layers of one cache, those that keep every token under the recipe's policy.

    Windows, states and layers that keep nothing are small, and stay as they are.

    Raises:
        RecipeError: a recipe under which the model would compute something else.
        TierError: no file can be made where the recipe says.
    """
    policy = policy_of(recipe)
    if policy is not None:
        _check(specs, recipe)
    layers = kinds.build_all(specs, recipe)
    if policy is None:
        return layers
    return [
        _under(policy, spec, layer, index)
        for index, (spec, layer) in enumerate(zip(specs, layers, strict=True))
    ]


def _check(specs: Sequence[LayerSpec], recipe: Recipe) -> None:
    """Refuse models whose attention goes by which tokens are stored."""
    for index, spec in enumerate(specs):
        reason = None
        if spec.foreign is not None:
            reason = "is of a kind of its own"
        elif spec.indexed:
            reason = "has an index of every token beside its keys"
        elif spec.counts_keys:
            reason = "takes the number of its keys for the number of tokens"
        if reason is not None:
            raise RecipeError(
                f"{recipe} does not fit this model: layer {index} {reason}, so no token may go. "
                f"Leave the policy out."
            )


def _under(policy: Policy, spec: LayerSpec, layer: CacheLayer, index: int) -> CacheLayer:
    if not spec.attends or spec.window is not None or layer.is_dummy:
        return layer
    if isinstance(layer, HybridLayer):
        attention = PolicyLayer(layer.attention, policy, index)
        return HybridLayer(attention, recurrent=layer.recurrent, indexer=layer.indexer)
    return PolicyLayer(layer, policy, index)
