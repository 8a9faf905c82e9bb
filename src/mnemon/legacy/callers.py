"""Who calls: code of today, or code of old."""

import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

__all__ = [
    "is_own_cache",
    "is_own_class",
    "is_remote",
    "names_used",
    "old_code_calls",
    "remote_classes",
]

_MODERN = frozenset(
    {"transformers", "torch", "accelerate", "peft", "mnemon", "huggingface_hub"}
) | sys.stdlib_module_names - {"__main__"}

# Configs look every attribute up in Python: whoever asked stands behind that.
_PASSING_ON = frozenset({"__getattribute__", "__setattr__"})


def old_code_calls(depth: int = 1) -> bool:
    """Whether the function that asks was called by code that is not of today's libraries.

    Remote modeling files live in ``transformers_modules``, users' code anywhere.

    Args:
        depth: frames between the function that asks and its caller.
    """
    frame: FrameType | None = sys._getframe(depth + 1)
    while frame is not None and frame.f_code.co_name in _PASSING_ON:
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] not in _MODERN


def is_own_cache(cache: object) -> bool:
    """Whether transformers' cache_utils or mnemon wrote the `update` of this cache.

    Classes with an `update` of their own (remote files, models of 4.57) keep lists of their own.
    """
    return is_own_class(type(cache))


def is_own_class(cls: Any) -> bool:
    """The same of the instances of a class."""
    module = str(getattr(cls.update, "__module__", ""))
    return module == "transformers.cache_utils" or module.startswith("mnemon.")


def is_remote(model_class: type) -> bool:
    """Whether a model's code came with its weights (or is a user's own)."""
    return model_class.__module__.partition(".")[0] not in _MODERN


@functools.lru_cache(maxsize=256)
def names_used(classes: tuple[type, ...]) -> frozenset[str]:
    """Names that `classes` and the functions beside them mention: globals, attributes, methods."""
    found: set[str] = set()
    homes = {owner.__module__ for owner in classes}
    files = [sys.modules[home] for home in homes if home in sys.modules]
    for owner in (*classes, *files):
        for value in vars(owner).values():
            function = inspect.unwrap(getattr(value, "__func__", value))
            # Of a file its own functions: helpers that the classes call.
            if inspect.isfunction(function) and function.__module__ in homes:
                for code in _codes(function.__code__):
                    found.update(code.co_names)
    return frozenset(found)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def remote_classes(model: Any) -> tuple[type, ...]:
    """The classes of a model and its modules that remote code wrote, without their order."""
    found = {base for module in model.modules() for base in type(module).__mro__ if is_remote(base)}
    return tuple(sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__)))
