"""Whether tensors fit the axes of an export: compiled code would not notice."""

from collections.abc import Sequence
from typing import Any

from mnemon.errors import ExportError
from mnemon.export.axes import Shapes, is_sum, total_of
from mnemon.export.forms import CacheForm
from mnemon.export.targets import PartInfo

__all__ = ["check_axes"]


def check_axes(form: CacheForm, shapes: Shapes, part: PartInfo, tensors: Sequence[Any]) -> None:
    """Compare the tensors of a call, in the order of the part's inputs, with the export's axes.

    Raises:
        ExportError: what came, what was expected.
    """
    symbols: dict[str, tuple[int, str]] = {}
    sums: list[tuple[str, str, int]] = []
    for axis in shapes.axes:  # what is pinned is part of sums
        if axis.role and axis.size is not None:
            symbols.setdefault(axis.role, (axis.size, "ranges"))
    full = True  # whether a window holds all that it can
    for name, tensor in zip(part.inputs, tensors, strict=True):
        axes = shapes.of(name)
        if tensor.ndim != len(axes):
            shape = list(tensor.shape)
            raise ExportError(f"{name} has shape {shape}; {len(axes)} axes were expected.")
        for axis, size in zip(axes, tensor.shape, strict=True):
            label = f"{name}[{axis.dim}]"
            if axis.role == "past":
                full = full and size == form.windows.get("past")
            if axis.size is not None:
                if size != axis.size:
                    raise ExportError(f"{label} is {size}; this export takes {axis.size} only.")
                continue
            if size < axis.low or (axis.high is not None and size > axis.high):
                most = "any" if axis.high is None else axis.high
                raise ExportError(f"{label} is {size}; it takes {axis.low} to {most}.")
            if is_sum(axis.name):
                sums.append((label, axis.name, size))
                continue
            held, where = symbols.setdefault(axis.name, (size, label))
            if held != size:
                raise ExportError(
                    f"{label} is {size} and {where} is {held}; both are {axis.name!r}."
                )
    sizes = {name: size for name, (size, _) in symbols.items()}
    for label, whole, size in sums:
        expected = total_of(whole, sizes)
        if expected is None:
            continue  # what was seen is in no shape
        if size == expected or (size > expected and full and not form.keeps_all):
            continue
        raise ExportError(f"{label} is {size}; {whole} is {expected} here.")
