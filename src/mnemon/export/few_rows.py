"""Matrix products of a decode step, as code that a compiler makes.

A step multiplies every weight with one row per sequence. torch hands that to its BLAS library, for
float32 MKL, which takes its slowest code for it on processors of other makers than Intel (half of
the memory's speed or less). While `few_rows` is open, a linear layer becomes a choice inside the
graph: few rows are products and sums that inductor compiles for this processor, more rows go to the
library.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["few_rows"]

_MOST_ROWS = 4


class few_rows(TorchFunctionMode):
    """While open, ``torch.nn.functional.linear`` is traced as such a choice."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    product: Tensor = torch.cond(rows.shape[0] <= _MOST_ROWS, _few, _many, (rows, weight))
    out = product.view(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _few(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows.unsqueeze(1) * weight).sum(-1)


def _many(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(rows, weight.t())
