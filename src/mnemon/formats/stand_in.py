"""A tensor that stands in for numbers which lie elsewhere, until somebody asks for them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mnemon.errors import CacheError

__all__ = ["StandIn"]


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


# What is asked of a tensor without reading a number of it.
_FACTS: frozenset[Any] = frozenset(
    [
        *(
            _getter(name)
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf"),
                *("grad", "grad_fn", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"),
                *("is_quantized", "is_sparse", "is_nested", "is_mkldnn", "itemsize", "nbytes"),
                "_version",
            )
        ),
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.get_device,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.is_inference,
        Tensor.__len__,
        Tensor.__hash__,
    ]
)


class StandIn(Tensor):
    """Every torch function is given the numbers, fetched for that call. It cannot be written to.

    Made by ``Tensor._make_wrapper_subclass``; shape, dtype and device are known without fetching.
    """

    @abstractmethod
    def dense(self) -> Tensor:
        """The numbers: an ordinary tensor."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        if name in _WRITING or (writes and name not in _READING):
            _refuse_write(name, args[0] if args else None)
        _refuse_write(f"{name}(out=)", kwargs.get("out"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_dense, args), **tree_map(_dense, dict(kwargs)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What reaches us from inside torch, past `__torch_function__`.
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                came = args[place] if place < len(args) else kwargs.get(argument.name)
                _refuse_write(str(func), came)
        return func(*tree_map(_dense, args), **tree_map(_dense, dict(kwargs)))


_WRITING = frozenset(
    ["__setitem__", "set_", "__set__"]
    + [f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")]
    + [f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")]
)
#: End in an underscore and change no number.
_READING = frozenset(["requires_grad_", "retain_grad_", "detach_"])


def _dense(x: Any) -> Any:
    return x.dense() if isinstance(x, StandIn) else x


def _refuse_write(name: str, target: Any) -> None:
    if isinstance(target, StandIn):
        raise CacheError(
            f"{name} writes to keys or values that a cache stores packed or elsewhere. Write to a "
            f"copy: tensor.dense() or tensor.clone()."
        )
