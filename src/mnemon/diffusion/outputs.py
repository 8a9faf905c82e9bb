"""What a sublayer or a block returns: a tensor, or a tuple of tensors (and None)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

from torch import Tensor

__all__ = ["Output", "answer_of", "combine", "nbytes", "tensors", "with_answer"]

Output: TypeAlias = Tensor | tuple[Tensor | None, ...]


def combine(function: Callable[..., Tensor], *outputs: Output) -> Output:
    """`function` of the tensors at the same place of each output; None stays None."""
    if isinstance(outputs[0], Tensor):
        return function(*outputs)
    return tuple(
        None if parts[0] is None else function(*parts)
        for parts in zip(*cast(Any, outputs), strict=True)
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def answer_of(result: Any) -> Tensor:
    """The prediction in what a transformer returned: its first tensor."""
    found = getattr(result, "sample", result)
    return next(tensors(found if isinstance(found, Tensor) else tuple(found)))


def with_answer(result: Any, answer: Tensor) -> Any:
    """The same kind of result with another prediction."""
    if isinstance(result, Tensor):
        return answer
    if type(result) is tuple:
        return (answer, *result[1:])
    return type(result)(**{**result, "sample": answer})  # diffusers' output classes


def nbytes(values: Iterable[Any]) -> int:
    """The bytes that these keep alive, every storage counted once."""
    found: dict[int, int] = {}
    for value in values:
        for tensor in tensors(value):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
