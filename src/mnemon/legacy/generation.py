"""`generate` and `forward` as old models and old callers know them."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, __version__, cache_utils

from mnemon.cache import Cache as MnemonCache
from mnemon.errors import CacheError
from mnemon.layers.sliding import SlidingLayer
from mnemon.legacy.callers import is_remote, names_used, remote_classes
from mnemon.legacy.hosts import is_pair
from mnemon.legacy.patches import Patches
from mnemon.legacy.tuples import cache_for, is_tuple
from mnemon.legacy.warning import Notices
from mnemon.names import lookup

__all__ = ["install"]

_CACHE_NAMES = frozenset(
    "Cache DynamicCache StaticCache SinkCache HybridCache EncoderDecoderCache get_seq_length "
    "get_usable_length seen_tokens key_cache from_legacy_cache get_max_cache_shape "
    "get_max_length".split()
)
_MODERN_MASKS = frozenset(
    "get_mask_sizes create_causal_mask create_sliding_window_causal_mask "
    "create_masks_for_generate".split()
)
_POSITIONS = ("position_ids", "decoder_position_ids")
_ADDED_ARGUMENTS = ("next_sequence_length", "is_first_iteration")


class OldPast(tuple[Any, ...]):
    """A tuple that a model of old keeps its past in, with the little that `generate` asks of it."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens: in which axis they lie only the model knows; it cuts its inputs itself."""
        return 0


def install(patches: Patches, notices: Notices) -> None:
    native = lookup("tuple_to_generate").there_in(__version__)
    patches.put(
        GenerationMixin, "generate", _generate(vars(GenerationMixin)["generate"], notices, native)
    )
    patches.put(
        GenerationMixin,
        "_prepare_cache_for_generation",
        _prepare_cache(vars(GenerationMixin)["_prepare_cache_for_generation"]),
    )
    if not native:
        patches.put(PreTrainedModel, "__call__", _call(notices))


# -- what a model of old is like -------------------------------------------------------------------


def _wrote_itself(model: Any) -> bool:
    """Whether all of a model's code came with it: none of its modules is one of transformers'."""
    if not is_remote(type(model)):
        return False
    return not any(
        base.__module__.startswith("transformers.models.") and issubclass(base, PreTrainedModel)
        for kind in {type(module) for module in model.modules()}
        for base in kind.__mro__
    )


def _keeps_tuples(model: Any) -> bool:
    """Whether a model's own code keeps its past in tuples and knows no cache class.

    It says so itself (`_supports_cache_class`, 4.36 to 4.55), or none of its functions mentions
    one.
    """
    if not _wrote_itself(model):
        return False
    for cls in type(model).__mro__:
        said = vars(cls).get("_supports_cache_class")
        if said is not None and is_remote(cls):
            return not said
    return not _knows_caches(model)


def _knows_caches(model: Any) -> bool:
    """Whether a model's own code mentions a cache class or what only one answers."""
    return bool(names_used(remote_classes(model)) & _CACHE_NAMES)


def _masks_by_itself(model: Any) -> bool:
    """Whether a model of old makes its own masks, for a cache that keeps every token."""
    return _wrote_itself(model) and not names_used(remote_classes(model)) & _MODERN_MASKS


# -- generate --------------------------------------------------------------------------------------


def _generate(own: Callable[..., Any], notices: Notices, native: bool) -> Callable[..., Any]:
    @functools.wraps(own)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        if isinstance(past, cache_utils.Cache) and _keeps_tuples(self) and not _knows_caches(self):
            raise CacheError(
                f"{type(self).__name__} keeps its past in tuples and knows no cache class; got a "
                f"{type(past).__name__}. Leave past_key_values out, or pass it a tuple "
                "(cache.to_legacy_cache()) of its own layout."
            )
        if past is not None and is_tuple(past):
            if _keeps_tuples(self):
                kwargs["past_key_values"] = OldPast(past) if len(past) else None
            elif not native:
                notices.give("tuple_to_generate")
                kwargs["past_key_values"] = cache_for(self, past)
                _mask_decoded(self, kwargs)
        as_tuple = not native and kwargs.pop("return_legacy_cache", False)
        with _old_inputs(self, kwargs, native):
            result = own(self, *args, **kwargs)
        if as_tuple and hasattr(getattr(result, "past_key_values", None), "to_legacy_cache"):
            notices.give("return_legacy_cache")
            result.past_key_values = result.past_key_values.to_legacy_cache()
        return result

    return generate


def _mask_decoded(model: Any, kwargs: dict[str, Any]) -> None:
    """Say which decoder tokens came: today's `generate` tells cached ones by this mask only."""
    decoded = kwargs.get("decoder_input_ids")
    takes_mask = "decoder_attention_mask" in inspect.signature(model.forward).parameters
    if decoded is not None and takes_mask and kwargs.get("decoder_attention_mask") is None:
        kwargs["decoder_attention_mask"] = torch.ones_like(decoded)


@contextlib.contextmanager
def _old_inputs(model: Any, given: dict[str, Any], native: bool) -> Iterator[None]:
    """While `generate` runs, a remote model's own preparation of inputs gets what it expects.

    That is: a mask also where it hides nothing; and where the preparation is its own,
    `cache_position`, no position ids but the caller's, and no arguments of today. A cache reorders
    itself.
    """
    prepare = model.prepare_inputs_for_generation
    function = inspect.unwrap(getattr(prepare, "__func__", prepare))
    wrapped = "prepare_inputs_for_generation" in vars(model)
    its_own = is_remote_function(function)
    if native or wrapped or not (its_own or _wrote_itself(model)):
        yield
        return
    wanted = inspect.signature(function).parameters
    masked = "attention_mask" in inspect.signature(model.forward).parameters

    num_embedded = 0  # tokens of the prompt that came as embeddings: the ids lack them

    @functools.wraps(prepare)
    def prepare_as_of_old(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_embedded
        embeds, past = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        held, num_new = _lengths(input_ids, kwargs.get("next_sequence_length"), kwargs)
        if isinstance(past, tuple) and held:
            held += num_embedded
        elif embeds is not None and not held:
            num_embedded = embeds.shape[1] - input_ids.shape[1]
        unknown = [name for name in _ADDED_ARGUMENTS if name not in wanted]
        unknown += [name for name in _POSITIONS if name not in given]
        for name in unknown if its_own else ():
            kwargs.pop(name, None)
        if "cache_position" in wanted and kwargs.get("cache_position") is None:
            new = torch.arange(held, held + num_new, device=input_ids.device)
            kwargs["cache_position"] = new
        if masked and kwargs.get("attention_mask") is None and not model.config.is_encoder_decoder:
            # Today's `generate` drops a mask of ones; old code reads its length.
            length = max(held + num_new, input_ids.shape[1])
            kwargs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], length)
        if its_own and embeds is not None and isinstance(past, cache_utils.Cache) and not held:
            # Of old there was no cache before the first step, and embeddings were taken then only.
            prepared = prepare(input_ids, *args, **{**kwargs, "past_key_values": None})
            return {**prepared, "past_key_values": past}
        return prepare(input_ids, *args, **kwargs)

    added: dict[str, Callable[..., Any]] = {"prepare_inputs_for_generation": prepare_as_of_old}
    own_reordering = getattr(model, "_reorder_cache", None)
    if own_reordering is not None and "_reorder_cache" not in vars(model):
        added["_reorder_cache"] = _reordering(own_reordering)
    vars(model).update(added)
    try:
        yield
    finally:
        for name in added:
            del vars(model)[name]


def _reordering(own: Callable[..., Any]) -> Callable[..., Any]:
    """A model's own reordering for tuples only: of old a cache was asked to do it itself."""

    @functools.wraps(own)
    def reorder(past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        if isinstance(past_key_values, cache_utils.Cache):
            past_key_values.reorder_cache(beam_idx)  # type: ignore[arg-type]  # an int64 tensor
            return past_key_values
        return own(past_key_values, beam_idx)

    return reorder


def is_remote_function(function: Any) -> bool:
    """Whether a function was not written by transformers."""
    module = str(getattr(function, "__module__", ""))
    return module.partition(".")[0] not in ("transformers", "mnemon", "torch")


def _lengths(
    input_ids: torch.Tensor, num_new: int | None, kwargs: dict[str, Any]
) -> tuple[int, int]:
    """Tokens in the cache, and tokens that the next step reads."""
    past, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
    if isinstance(past, tuple) and num_new is not None:
        # What a model's own `_reorder_cache` made of a cache: only it knows the axis of tokens.
        return input_ids.shape[1] - num_new, num_new
    held = 0 if past is None or isinstance(past, tuple) else int(past.get_seq_length())
    if num_new is None:
        first = embeds is not None and held == 0
        num_new = embeds.shape[1] if first else input_ids.shape[1]  # type: ignore[union-attr]
    return held, num_new


def _prepare_cache(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def prepare(self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kw: Any) -> Any:
        name = "past_key_values"
        users = model_kwargs.get(name)
        if isinstance(users, MnemonCache) and _masks_by_itself(self):
            _keep_every_token(users)
        plain = generation_config.cache_implementation in (None, "dynamic")
        if plain and (isinstance(users, OldPast) or (users is None and _keeps_tuples(self))):
            return None
        result = own(self, generation_config, model_kwargs, *args, **kw)
        made = model_kwargs.get(name)
        if users is None and type(made) is cache_utils.DynamicCache:
            kinds = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}
            if {type(layer) for layer in made.layers} <= kinds and _masks_by_itself(self):
                # Of old a cache had no layers before their first tokens and kept every token; the
                # model's mask cut the window out of it.
                model_kwargs[name] = cache_utils.DynamicCache()
        return result

    return prepare


def _keep_every_token(cache: MnemonCache) -> None:
    """Let the windows of an empty cache grow, for a model whose own mask cuts them out."""
    if cache.num_tokens or is_pair(cache):
        return
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SlidingLayer):
            cache.layers[index] = layer.unbounded()


# -- forward ---------------------------------------------------------------------------------------


def _call(notices: Notices) -> Callable[..., Any]:
    """A model of transformers' own takes the past as a tuple and answers with a cache."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_remote(type(self)):
            past = kwargs.get("past_key_values")
            if past is not None and is_tuple(past):
                notices.give("tuple_to_forward")
                kwargs["past_key_values"] = cache_for(self, past)
            elif any(type(arg) in (tuple, list) for arg in args):
                args = _converted(self, args, notices)
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    return __call__


def _converted(model: Any, args: tuple[Any, ...], notices: Notices) -> tuple[Any, ...]:
    """Positional arguments with the past, where it is among them, as a cache."""
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    result = list(args)
    for index, (name, arg) in enumerate(zip(names, args, strict=False)):
        if name == "past_key_values" and is_tuple(arg):
            notices.give("tuple_to_forward")
            result[index] = cache_for(model, arg)
    return tuple(result)
