"""What `mnemon demo` sets side by side: transformers' caches and every recipe that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Contender", "contender", "contenders", "held_bytes", "held_tokens", "stored_bytes"]

REFERENCE = "DynamicCache"  # the cache that everything else is compared with
ATTACHED = " + attach"
LOSSLESS_FORMATS = ("dense", "static")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One cache in the comparison.

    Args:
        name: as the tables show it.
        library: "transformers" or "mnemon".
        make: from the number of tokens it must hold to an empty cache.
        attached: whether `mnemon.attach` is in force while it runs.
        lossless: whether it should give the reference's tokens.
    """

    name: str
    library: str
    make: Callable[[int], Any]
    attached: bool = False
    lossless: bool = True

    def session(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """What must be open around a forward pass with this cache."""
        if not self.attached:
            return nullcontext()
        import mnemon

        session: AbstractContextManager[Any] = mnemon.attach(model)
        return session


def contenders(model: PreTrainedModel) -> list[Contender]:
    """Every cache that can be tried here, transformers' dynamic one (the reference) first."""
    return [*_transformers_caches(model.config), *_recipes(model.config)]


def contender(model: PreTrainedModel, name: str) -> Contender:
    """The cache that a user calls `name`.

    Args:
        model: what it is for.
        name: as `contenders` lists it; "quanto-4" and "hqq-4" for transformers' quantized caches;
            any recipe, alone or with " + attach".

    Raises:
        RecipeError: none of these.
    """
    for each in contenders(model):
        if name == each.name or (each.name.endswith("-4") and each.name.endswith(f" {name}")):
            return each
    return _recipe(model.config, name.removesuffix(ATTACHED), attached=name.endswith(ATTACHED))


def _transformers_caches(config: Any) -> Iterator[Contender]:
    from transformers import DynamicCache, QuantizedCache, StaticCache

    yield Contender(
        name=REFERENCE, library="transformers", make=lambda tokens: DynamicCache(config=config)
    )
    yield Contender(
        name="StaticCache",
        library="transformers",
        make=lambda tokens: StaticCache(config=config, max_cache_len=tokens),
    )
    yield Contender(
        name="QuantizedCache fp8",
        library="transformers",
        make=lambda tokens: QuantizedCache("fp8", config),
        lossless=False,
    )
    # hqq groups along the last axis only; quanto's own default is right for quanto.
    for package, backend, options in (
        ("optimum.quanto", "quanto", {}),
        ("hqq", "hqq", {"axis_key": 1, "axis_value": 1}),
    ):
        if _installed(package):

            def make(tokens: int, backend: str = backend, options: Any = options) -> Any:
                return QuantizedCache(backend, config, nbits=4, **options)

            yield Contender(
                name=f"QuantizedCache {backend}-4",
                library="transformers",
                make=make,
                lossless=False,
            )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False


def _recipes(config: Any) -> Iterator[Contender]:
    from mnemon import recipe

    for usage in recipe.available():
        parsed = recipe.parse(usage)
        if any(term.name in recipe.LEARNED for term in parsed.policies):
            continue  # a retrofitted model has it in every cache, and no other model has
        plain = parsed.format.name in LOSSLESS_FORMATS and not (parsed.tier or parsed.policies)
        # What is packed or lies elsewhere is made to be read by mnemon's attention: without it
        # every step makes all of it dense.
        for attached in (False, True) if plain else (True,):
            yield _recipe(config, usage, attached=attached)


def _recipe(config: Any, usage: str, *, attached: bool) -> Contender:
    import mnemon
    from mnemon import recipe

    parsed = recipe.parse(usage)
    # "static(4096)" is an example: it is sized to what each run needs.
    sized = parsed.static_tokens is not None

    def make(tokens: int) -> Any:
        if not sized:
            return mnemon.Cache(config, usage)
        form = recipe.Term(name="static", args=(tokens,))
        return mnemon.Cache(config, str(replace(parsed, format=form)))

    name = str(replace(parsed, format=recipe.Term(name="static"))) if sized else usage
    return Contender(
        name=name + (ATTACHED if attached else ""),
        library="mnemon",
        make=make,
        attached=attached,
        lossless=parsed.format.name in LOSSLESS_FORMATS and not parsed.policies,
    )


def stored_bytes(cache: Any) -> int:
    """Bytes that the tokens held now take, without reserve, in any cache of either library."""
    import mnemon

    if isinstance(cache, mnemon.Cache):
        return int(cache.nbytes)
    held = held_bytes(cache)
    # A static layer owns its whole buffer from the start; what counts is the filled part.
    for layer in cache.layers:
        if type(layer).__name__.startswith("Static"):
            num_slots = int(layer.keys.shape[-2])
            unused = num_slots - min(int(layer.get_seq_length()), num_slots)
            held -= unused * (layer.keys.nbytes + layer.values.nbytes) // num_slots
    return held


def held_tokens(cache: Any) -> int | None:
    """Tokens that a cache of either library has seen; None where it keeps no count (states)."""
    import mnemon

    if isinstance(cache, mnemon.Cache):
        return int(cache.num_tokens)
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def held_bytes(cache: Any) -> int:
    """Bytes of all buffers that a cache holds, reserve included, each storage counted once."""
    import mnemon

    if isinstance(cache, mnemon.Cache):
        return int(cache.nbytes_reserved)
    storages = {}
    for tensor in _tensors(cache.layers, set()):
        storage = tensor.untyped_storage()
        storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Plain tensors anywhere inside a cache; packed ones (quanto) are opened."""
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if type(value) is not torch.Tensor and inner is not None:
            for name in inner()[0]:
                yield from _tensors(getattr(value, name), seen)
        else:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("transformers."):
        yield from _tensors(getattr(value, "__dict__", {}), seen)
