"""Switching mnemon's attention on for one model, and off again without a trace.

An attention module asks ``self.config._attn_implementation`` which function to use. So each module
that mnemon serves gets a copy of its config that differs in that one name; the model's own configs
are never written to. Masks are therefore built exactly as before, other models built from the same
config object are not touched, and restoring puts the very same config objects back.
"""

import copy
import inspect
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel

from mnemon.errors import CacheError
from mnemon.hf.attention_functions import register
from mnemon.hf.eager import disagreement, interface_code, passed_options
from mnemon.hf.masks import ATTENTION_NAME, EAGER_NAME
from mnemon.hf.names import PreTrainedConfig

__all__ = ["Restore", "enable"]

# What modules call the projection that makes their keys.
_KEYS = frozenset(
    (
        "c_attn",
        "k",
        "k_lin",
        "k_proj",
        "key",
        "key_proj",
        "qkv",
        "qkv_proj",
        "query_key_value",
        "Wqkv",
    )
)
_STANDS_IN_FOR = {"sdpa": ATTENTION_NAME, "eager": EAGER_NAME}


@dataclass(slots=True)
class Restore:
    """What `enable` did to a model, and the way back. Also a context manager."""

    served: tuple[str, ...]
    """Names of the modules that use mnemon's attention."""
    left_alone: dict[str, str]
    """Attention modules that keep their own function, with the reason."""
    _originals: list[tuple[nn.Module, PreTrainedConfig]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Put every config back as it was; doing it again changes nothing."""
        while self._originals:
            module, config = self._originals.pop()
            module.config = config  # type: ignore[assignment]  # nn.Module types attributes as Module

    def __call__(self) -> None:
        """The same as `restore`."""
        self.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def enable(model: nn.Module) -> Restore:
    """Let the attention modules of one model use mnemon's attention.

    A module is served if its forward asks transformers for its attention function by
    ``self.config``, and used "sdpa", or used "eager" and mnemon's function gives the same numbers
    as its own. Every other module (flash attention, an attention of its own, code that asks for
    "sdpa" by name) is left alone and reported with the reason.

    Args:
        model: any transformers model; multimodal and encoder-decoder ones are walked as a whole.

    Returns:
        A `Restore`: what is served, what is left alone and why, and `restore()`.

    Raises:
        CacheError: the model is enabled already; restore it first.
    """
    register()
    copies: dict[tuple[int, str], PreTrainedConfig] = {}
    planned: list[tuple[nn.Module, PreTrainedConfig, PreTrainedConfig]] = []
    served: list[str] = []
    left_alone: dict[str, str] = {}
    tried: dict[tuple[type, int], str | None] = {}
    own_configs = {id(part.config) for part in model.modules() if isinstance(part, PreTrainedModel)}
    for name, module in model.named_modules():
        code = interface_code(module)
        if code is None:
            if _keeps_attention_of_its_own(module):
                left_alone[name] = "has an attention of its own, outside transformers' interface"
            continue
        config = module.__dict__.get("config")
        if not isinstance(config, PreTrainedConfig) or "config" not in code.co_names:
            left_alone[name] = "does not ask its own config for the attention function"
            continue
        before = config._attn_implementation
        if before in _STANDS_IN_FOR.values() and id(config) in own_configs:
            served.append(name)  # loaded with attn_implementation="mnemon": nothing to switch
            continue
        if before in _STANDS_IN_FOR.values():
            raise CacheError(
                f"module {name} already uses mnemon's attention: expected a model that does not; "
                "detach (or restore) it before attaching it again"
            )
        reason = _reason_against(module, before, tried)
        if reason is not None:
            left_alone[name] = reason
            continue
        standin = _STANDS_IN_FOR[before]
        key = (id(config), standin)
        if key not in copies:
            copies[key] = copy.copy(config)
            copies[key]._attn_implementation_internal = standin
        planned.append((module, config, copies[key]))
        served.append(name)

    restore = Restore(served=tuple(served), left_alone=left_alone)
    for module, config, replacement in planned:
        restore._originals.append((module, config))
        module.config = replacement  # type: ignore[assignment]  # as above
    return restore


def _reason_against(
    module: nn.Module, before: str | None, tried: dict[tuple[type, int], str | None]
) -> str | None:
    """Why a module is left alone, or None if mnemon serves it."""
    if before not in _STANDS_IN_FOR:
        return f"uses {before}, which mnemon does not stand in for"
    interface: Any = inspect.unwrap(type(module).forward).__globals__["ALL_ATTENTION_FUNCTIONS"]
    if before in getattr(interface, "_local_mapping", {}):
        return f"its file has a {before} function of its own"
    if _asks_by_name(type(module), before):
        return f"its code asks for {before!r} by name"
    if before != "eager":
        return "uses sdpa, which ignores its soft-capping" if _softcaps(module) else None
    key = (type(module), int(getattr(module, "num_key_value_groups", 1) or 1))
    if key not in tried:
        tried[key] = disagreement(module)
    return tried[key]


def _softcaps(module: nn.Module) -> bool:
    """Whether a module soft-caps its scores: up to transformers 5.21 "sdpa" passes over that."""
    cap = getattr(module, "attn_logit_softcapping", None)
    return cap is not None and "softcap" in passed_options(module)


def _asks_by_name(cls: type, name: str) -> bool:
    """Whether a class reads the implementation beside a constant naming it: it may act by it."""
    for member in vars(cls).values():
        code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
        if code is None or "_attn_implementation" not in code.co_names:
            continue
        for constant in code.co_consts:
            if constant == name or (isinstance(constant, tuple | frozenset) and name in constant):
                return True
    return False


def _keeps_attention_of_its_own(module: nn.Module) -> bool:
    """Whether a module looks like an attention with keys, outside the interface."""
    return "attention" in type(module).__name__.lower() and not _KEYS.isdisjoint(module._modules)
