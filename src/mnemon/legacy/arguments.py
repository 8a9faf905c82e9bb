"""Arguments that moved or went, of masks and of caches, and the rotary table "default"."""

import functools
import inspect
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils, masking_utils, modeling_rope_utils

from mnemon.legacy.callers import old_code_calls
from mnemon.legacy.hosts import replace_everywhere
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["install"]

_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


def install(patches: Patches, notices: Notices) -> None:
    replace_everywhere(patches, "get_mask_sizes", lambda own: _mask_sizes(own, notices))
    for name in _MASKS:
        own = vars(masking_utils)[name]
        taken = inspect.signature(own).parameters
        if "cache_position" not in taken or "input_embeds" not in taken:
            patches.put(masking_utils, name, _mask(own, set(taken), notices))
    patches.put(
        cache_utils.StaticCache, "__init__", _static(cache_utils.StaticCache.__init__, notices)
    )
    patches.put(
        cache_utils.DynamicCache, "__init__", _dynamic(cache_utils.DynamicCache.__init__, notices)
    )
    if "default" not in modeling_rope_utils.ROPE_INIT_FUNCTIONS:
        own_tables: Any = modeling_rope_utils.ROPE_INIT_FUNCTIONS
        added: dict[str, Any] = {"default": default_rotations}
        tables: ChainMap[str, Any] = ChainMap(added, own_tables)
        # For whoever imports it from now on; transformers' own models keep theirs.
        patches.put(modeling_rope_utils, "ROPE_INIT_FUNCTIONS", tables)
        patches.put(PreTrainedModel, "_init_weights", _init_weights(PreTrainedModel._init_weights))


def _mask_sizes(own: Callable[..., Any], notices: Notices) -> Callable[..., Any]:
    """The number of new tokens, which old code gives by their positions."""
    if "cache_position" in inspect.signature(own).parameters:
        return own

    def get_mask_sizes(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache_position" in kwargs:
            args = (kwargs.pop("cache_position"), *args)
        if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 1:
            notices.give("cache_position")
            args = (args[0].shape[0], *args[1:])
        return own(self, *args, **kwargs)

    return get_mask_sizes


def _mask(own: Callable[..., Any], taken: set[str], notices: Notices) -> Callable[..., Any]:
    """`create_*_mask` by the names of 4.53 to 5.3: input_embeds, cache_position."""

    @functools.wraps(own)
    def create(*args: Any, **kwargs: Any) -> Any:
        if "input_embeds" in kwargs and "input_embeds" not in taken:
            kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
        if "cache_position" in kwargs and "cache_position" not in taken:
            # The cache says itself where the new tokens stand.
            notices.give("cache_position")
            del kwargs["cache_position"]
        return own(*args, **kwargs)

    return create


def _static(own: Callable[..., None], notices: Notices) -> Callable[..., None]:
    @functools.wraps(own)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 and type(args[1]) is int and old_code_calls():
            # (max_batch_size, max_cache_len, device, dtype); today a bool stands second.
            notices.give("static_cache_arguments")
            args = (args[1],)
        own(self, config, *args, **kwargs)

    return __init__


def _dynamic(own: Callable[..., None], notices: Notices) -> Callable[..., None]:
    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if (args and type(args[0]) is int) or "num_hidden_layers" in kwargs:
            notices.give("num_hidden_layers")
            kwargs.pop("num_hidden_layers", None)
            args = tuple(arg for arg in args if type(arg) is not int)
        own(self, *args, **kwargs)

    return __init__


def default_rotations(
    config: Any = None, device: Any = None, seq_len: int | None = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies of plain rotary embeddings, [head_dim / 2], and the factor 1.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        theta = config.rope_parameters["rope_theta"]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * (getattr(config, "partial_rotary_factor", None) or 1.0))
    steps = torch.arange(0, width, 2, dtype=torch.int64).to(device=device, dtype=torch.float)
    return theta ** -(steps / width), 1.0


def _init_weights(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def init_weights(self: Any, module: Any) -> None:
        plain = getattr(module, "rope_type", None) == "default"
        if plain and not hasattr(module, "compute_default_rope_parameters"):
            return  # it computed its table in __init__; today's models compute it anew
        own(self, module)

    return init_weights
