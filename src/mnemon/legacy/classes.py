"""Cache classes that are gone: today's classes, made by the arguments of old."""

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from transformers import cache_utils

from mnemon.errors import CacheError
from mnemon.legacy.patches import Patches
from mnemon.legacy.sink import SinkCache
from mnemon.legacy.warning import Notices

__all__ = ["install"]

_NAMES_OF_OLD = ("max_batch_size", "max_cache_len", "device", "dtype", "layer_device_map")
_QUANTIZED = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")


def install(patches: Patches, notices: Notices) -> None:
    for name, cls in _made(notices).items():
        own = getattr(cache_utils, name, None)
        # From 4.53 SinkCache only raised; from 5.6 SlidingWindowCache is StaticCache itself.
        alias = own is cache_utils.StaticCache
        empty = name == "SinkCache" and "window_length" not in _arguments(own)
        if own is None or alias or empty:
            patches.put(cache_utils, name, cls)
            for package in _packages():
                patches.put(package, name, cls)


def _packages() -> list[ModuleType]:
    """The package `transformers`, in every copy that somebody holds.

    ``transformers.processing_utils`` imports it a second time and puts that into ``sys.modules``;
    whoever imported it before keeps the first.
    """
    import transformers.processing_utils  # so that it does not happen later

    found = {
        id(transformers): transformers,
        id(sys.modules["transformers"]): sys.modules["transformers"],
    }
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", {}).get("transformers")
        if isinstance(held, ModuleType) and held.__name__ == "transformers":
            found[id(held)] = held
    return list(found.values())


@functools.lru_cache(maxsize=1)
def _made(notices: Notices) -> dict[str, Any]:
    """The classes: the same ones however often the shim is switched on."""
    made = {
        "SinkCache": _noticed(SinkCache, "SinkCache", notices),
        "OffloadedCache": _offloaded(notices),
        "QuantizedCacheConfig": _quantized_config(notices),
    }
    for name in ("HybridCache", "HybridChunkedCache", "SlidingWindowCache"):
        made[name] = _preallocated(name, notices)
    for name in ("OffloadedStaticCache", "OffloadedHybridCache"):
        made[name] = _preallocated(name, notices, offloading=True)
    for name, backend in (("QuantoQuantizedCache", "quanto"), ("HQQQuantizedCache", "hqq")):
        made[name] = _quantized(name, backend, notices)
    return made


def _arguments(cls: type | None) -> list[str]:
    return [] if cls is None else list(inspect.signature(cls).parameters)


def _named(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    return type(bases[0])(name, bases, {"__module__": __name__, **body})


def _noticed(cls: type, key: str, notices: Notices) -> Any:
    """`cls`, with a warning when it is first made."""

    class Meta(type):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            notices.give(key)
            return cls(*args, **kwargs)

        def __instancecheck__(self, instance: object) -> bool:
            return isinstance(instance, cls)

        def __subclasscheck__(self, subclass: type) -> bool:
            return issubclass(subclass, cls)

    return Meta(key, (), {"__module__": __name__, "__doc__": cls.__doc__})


def _preallocated(name: str, notices: Notices, offloading: bool = False) -> Any:
    """A `StaticCache` made by (config, [max_batch_size,] max_cache_len, device, dtype)."""

    class Meta(type):
        def __instancecheck__(self, instance: object) -> bool:
            # `generate` makes StaticCache for what used to be its subclasses.
            if type.__instancecheck__(self, instance):
                return True
            if not isinstance(instance, cache_utils.StaticCache):
                return False
            sliding = [bool(flag) for flag in instance.is_sliding]
            if offloading:
                return bool(instance.offloading)
            return all(sliding) if name == "SlidingWindowCache" else any(sliding)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        notices.give(name if name != "OffloadedHybridCache" else "OffloadedStaticCache")
        size = _cache_length(name, args, kwargs)
        if size is None:
            size = config.get_text_config(decoder=True).max_position_embeddings
        cache_utils.StaticCache.__init__(
            self, config=config, max_cache_len=size, offloading=offloading and _has_cuda()
        )

    doc = f"transformers' {name}: a StaticCache, whose layers follow the config."
    return Meta(name, (cache_utils.StaticCache,), {
        "__module__": __name__, "__init__": __init__, "__doc__": doc,
    })  # fmt: skip


def _cache_length(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many tokens: the argument stood second or third, as releases differed."""
    unknown = sorted(set(kwargs) - {*_NAMES_OF_OLD, "batch_size", "offloading"})
    if unknown:
        raise CacheError(
            f"{name} takes config, max_batch_size, max_cache_len, device and dtype; got {unknown}."
        )
    numbers = [arg for arg in args[:2] if isinstance(arg, int)]
    if "max_cache_len" in kwargs:
        size = kwargs["max_cache_len"]
    elif len(numbers) == 2:  # (max_batch_size, max_cache_len), up to 4.55
        size = numbers[1]
    elif len(numbers) == 1 and not {"max_batch_size", "batch_size"} & set(kwargs):
        raise CacheError(
            f"{name}(config, {numbers[0]}) may mean max_batch_size, as up to 4.55, or "
            "max_cache_len, as in 4.56: name it, max_cache_len=n."
        )
    else:
        size = numbers[0] if numbers else None
    if size is not None and (not isinstance(size, int) or size < 1):
        raise CacheError(f"{name} takes max_cache_len, a number of tokens >= 1; got {size!r}.")
    return size


def _offloaded(notices: Notices) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        notices.give("OffloadedCache")
        kwargs.pop("num_hidden_layers", None)
        kwargs["offloading"] = _has_cuda()
        cache_utils.DynamicCache.__init__(self, *args, **kwargs)

    doc = "A DynamicCache whose layers wait in host memory; without CUDA a plain one."
    return _named(
        "OffloadedCache", (cache_utils.DynamicCache,), {"__init__": __init__, "__doc__": doc}
    )


def _has_cuda() -> bool:
    # transformers moves layers with CUDA streams; on a CPU they are in host memory anyway.
    return torch.cuda.is_available()


def _quantized_config(notices: Notices) -> Any:
    def __init__(self: Any, backend: str = "quanto", **settings: Any) -> None:
        notices.give("QuantizedCacheConfig")
        self.backend = backend
        self.settings = settings

    doc = "The settings of a quantized cache, for QuantoQuantizedCache and HQQQuantizedCache."
    return type(
        "QuantizedCacheConfig",
        (),
        {"__module__": __name__, "__init__": __init__, "__doc__": doc},
    )


def _quantized(name: str, backend: str, notices: Notices) -> Any:
    def __init__(self: Any, config: Any = None, *args: Any, **kwargs: Any) -> None:
        notices.give(name)
        model_config = config if hasattr(config, "get_text_config") else None
        if model_config is None:
            raise CacheError(
                f"{name} takes the model's config today; got {type(config).__name__}. Write "
                f"QuantizedCache(backend={backend!r}, config=model.config, nbits=4)."
            )
        settings = {**dict(zip(_QUANTIZED, args, strict=False)), **kwargs}
        cache_utils.QuantizedCache.__init__(self, backend, model_config, **settings)

    doc = f"QuantizedCache with the backend {backend!r}."
    return _named(name, (cache_utils.QuantizedCache,), {"__init__": __init__, "__doc__": doc})
