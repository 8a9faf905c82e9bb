"""A model's own attention function: finding it, and asking whether mnemon's gives the same.

A model that transformers runs in "eager" mode may do anything in its function. So nothing is
assumed from names or source: the function is run on a few random numbers beside mnemon's, and
mnemon serves the module only where the two agree.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mnemon.attention.dispatch import attend

__all__ = ["disagreement", "eager_function", "interface_code", "passed_options"]

_OPTIONS = ("softcap", "s_aux", "position_bias")


def interface_code(module: nn.Module) -> Any | None:
    """The code object of a forward that asks transformers for its attention function, or None."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return None
    return code


def passed_options(module: nn.Module) -> set[Any]:
    """Names that a module's forward passes by keyword, among other constants."""
    code = interface_code(module)
    constants = () if code is None else code.co_consts
    return {name for const in constants if isinstance(const, tuple) for name in const}


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The function that a module's forward names as its own ("eager"), or None."""
    forward = inspect.unwrap(type(module).forward)
    code = interface_code(module)
    if code is None:
        return None
    names = [name for name in code.co_names if "eager" in name and "attention" in name]
    found = [forward.__globals__[name] for name in names if name in forward.__globals__]
    return found[0] if len(found) == 1 and callable(found[0]) else None


@torch.no_grad()
def disagreement(module: nn.Module) -> str | None:
    """Why mnemon's attention may not stand in for a module's own function; None if it may.

    Runs both on random numbers, once plain and once with each option that the module's forward
    passes (soft-capping, sinks, position bias).
    """
    own = eager_function(module)
    if own is None:
        return "its own attention function was not found"
    passed = passed_options(module)
    sinks = getattr(module, "sinks", None)
    group = int(getattr(module, "num_key_value_groups", 1) or 1)
    num_heads = sinks.numel() if isinstance(sinks, Tensor) else 2 * group
    device = sinks.device if isinstance(sinks, Tensor) else torch.device("cpu")
    if device.type == "meta" or num_heads % group:
        return "its weights are not there to try it with"

    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    query = numbers(2, num_heads, 3, 8)
    keys, values = numbers(2, num_heads // group, 5, 8), numbers(2, num_heads // group, 5, 8)
    mask = numbers(2, 1, 3, 5)
    trials: list[dict[str, Any]] = [{}]
    if "softcap" in passed:
        trials.append({"softcap": 1.5})
    if "position_bias" in passed:
        trials.append({"position_bias": numbers(1, num_heads, 3, 5)})
    for options in trials:
        ours = attend(
            query, keys, values, mask=mask, scale=0.37, sinks=sinks,
            softcap=options.get("softcap"), bias=options.get("position_bias"),
        )  # fmt: skip
        try:
            theirs = own(
                module, query, keys, values, mask, scaling=0.37, dropout=0.0, s_aux=sinks, **options
            )[0]
            same = torch.allclose(theirs.transpose(1, 2).float(), ours, rtol=1e-3, atol=1e-3)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            return f"its own attention function could not be tried ({type(error).__name__})"
        if not same:
            return "its own attention function does something that mnemon's does not"
    return None
