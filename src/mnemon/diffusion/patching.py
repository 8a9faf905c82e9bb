"""Standing between a module and its callers: on the instance, never on its class."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from mnemon.errors import DiffusionError

__all__ = ["Handler", "Interceptor"]

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_MISSING: Any = object()


class Interceptor:
    """Takes a module's calls and gives each, with the original, to `handler`.

    A module that was compiled in place (``module.compile()``) is intercepted before its compiled
    code, so that this stays as it is; any other in its `forward`. Both are attributes of the
    instance, and both go away with `remove`. Where somebody else has put a wrapper around this one
    in the meantime, it stays, and hands calls through from then on.
    """

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        compiled = getattr(module, "_compiled_call_impl", None)
        self._name = "forward" if compiled is None else "_compiled_call_impl"
        self._module = module
        self._before = module.__dict__.get(self._name, _MISSING)
        self._original: Callable[..., Any] = getattr(module, self._name)
        self._handler: Handler | None = handler
        # Signatures are read by diffusers and accelerate: they find the original's.
        functools.update_wrapper(self, self._original, updated=())
        setattr(module, self._name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = self._handler
        if handler is None:
            return self._original(*args, **kwargs)
        return handler(self._original, args, kwargs)

    def remove(self) -> None:
        """Gives the module back what it had."""
        self._handler = None
        if self._module.__dict__.get(self._name) is not self:
            return
        if self._before is _MISSING:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module is a plain one: it must not run the original's layers."""
        if self._before is not _MISSING:
            return copy.deepcopy(self._before, memo)  # somebody else's wrapper is copied, too
        copied = memo[id(self._module)]
        return type(copied).forward.__get__(copied)

    def __reduce__(self) -> NoReturn:
        raise DiffusionError(
            f"this {type(self._module).__name__} cannot be pickled while a cache is attached to "
            "it; call mnemon.diffusion.detach(model) first, or save its state_dict()"
        )
