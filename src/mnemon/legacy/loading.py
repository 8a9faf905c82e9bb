"""What else keeps old modeling files from loading: imports, tied weights, buffers, rope_scaling."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils, utils
from transformers.models.auto import auto_factory
from transformers.utils import import_utils

from mnemon.hf.names import PreTrainedConfig
from mnemon.legacy.callers import is_remote, old_code_calls
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["install"]


def install(patches: Patches, notices: Notices) -> None:
    def is_torch_fx_available() -> bool:
        """Whether ``torch.fx`` is there: in every torch that this transformers takes."""
        notices.give("is_torch_fx_available")
        return True

    for module in (utils, import_utils):
        patches.add(module, "is_torch_fx_available", is_torch_fx_available)
    patches.put(auto_factory, "_get_model_class", _with_generation(auto_factory._get_model_class))
    _install_tied_weights(patches)
    _install_buffers(patches)
    own = vars(PreTrainedConfig).get("rope_scaling")
    if isinstance(own, property):
        patches.put(PreTrainedConfig, "rope_scaling", _rope_scaling(own))


# -- `generate` for a model that is loaded a second time -------------------------------------------


def _with_generation(own: Callable[..., Any]) -> Callable[..., Any]:
    """The class of a model, with `generate`, which only the first load of remote code gives it."""

    @functools.wraps(own)
    def get_model_class(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        if isinstance(found, type) and is_remote(found):
            found = auto_factory.add_generation_mixin_to_remote_model(found)
        return found

    return get_model_class


# -- tied weights: a list of names, a mapping today ------------------------------------------------


def _install_tied_weights(patches: Patches) -> None:
    own = vars(PreTrainedModel).get("get_expanded_tied_weights_keys")
    if own is None:  # up to 4.57 the list is what is read
        return

    @functools.wraps(own)
    def expand(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_remote(type(self)) and not isinstance(self._tied_weights_keys, dict):
            # On the instance: other code of transformers reads it too, long after loading.
            self._tied_weights_keys = _tied_pairs(self, self._tied_weights_keys or ())
        return own(self, *args, **kwargs)

    patches.put(PreTrainedModel, "get_expanded_tied_weights_keys", expand)


def _tied_pairs(model: Any, listed: Iterable[str]) -> dict[str, str]:
    """Which weight is tied to which: the output embedding, and what is listed, to the input's.

    Of old the output embedding was tied in any case; the list named what may be missing from a
    file, such as the embeddings of an encoder and a decoder that share theirs.
    """
    try:
        into, out_of = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a model that does not say where they are has none to tie
        return {}
    shared = getattr(into, "weight", None)
    if shared is None:
        return {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    source = names[id(into)]
    found = {
        name
        for name, weight in weights.items()
        if weight.shape == shared.shape and any(re.search(pattern, name) for pattern in listed)
    }
    if getattr(getattr(out_of, "weight", None), "shape", None) == shared.shape:
        found.add(names[id(out_of)])
    return dict.fromkeys(sorted(found - {source}), source)


# -- buffers that are not saved: computed in __init__, lost on the meta device ---------------------


def _install_buffers(patches: Patches) -> None:
    context = vars(PreTrainedModel).get("get_init_context")
    move = vars(PreTrainedModel).get("_move_missing_keys_from_meta_to_device")
    if context is None or move is None or not hasattr(modeling_utils, "init"):
        return  # before 5.0 buffers were computed where they are used

    @functools.wraps(context.__func__)
    def get_init_context(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = list(context.__func__(cls, *args, **kwargs))
        if not is_remote(cls):
            return found
        meta = torch.device("meta")
        return [_ParametersOnMeta() if part == meta else part for part in found]

    @functools.wraps(move)
    def move_missing(self: Any, *args: Any, **kwargs: Any) -> None:
        computed = {
            name: buffer
            for name, buffer in self.named_non_persistent_buffers()
            if buffer is not None and buffer.device.type != "meta"
        }
        move(self, *args, **kwargs)
        if is_remote(type(self)):
            for name, buffer in computed.items():
                path, _, leaf = name.rpartition(".")
                owner = self.get_submodule(path)
                owner._buffers[leaf] = buffer.to(owner._buffers[leaf].device)

    patches.put(PreTrainedModel, "get_init_context", classmethod(get_init_context))
    patches.put(PreTrainedModel, "_move_missing_keys_from_meta_to_device", move_missing)


class _ParametersOnMeta:
    """Parameters are made without memory, as they will be loaded; everything else is real."""

    def __enter__(self) -> None:
        self._own: Callable[..., None] = torch.nn.Module.register_parameter
        own = self._own

        def register(module: torch.nn.Module, name: str, param: Any) -> None:
            own(module, name, param)
            made = module._parameters[name]
            if made is not None and made.device.type != "meta":
                kind = type(made)
                flags = {**made.__dict__, "requires_grad": made.requires_grad}
                module._parameters[name] = kind(made.to("meta"), **flags)

        torch.nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]

    def __exit__(self, *error: object) -> None:
        torch.nn.Module.register_parameter = self._own  # type: ignore[method-assign]


# -- rope_scaling: None of old is {"rope_type": "default", ...} today ------------------------------


def _rope_scaling(own: property) -> property:
    assert own.fget is not None
    assert own.fset is not None
    read, write = own.fget, own.fset

    def rope_scaling(self: Any) -> Any:
        found = read(self)
        if not isinstance(found, dict) or not old_code_calls():
            return found
        kind = found.get("rope_type", "default")
        return None if kind == "default" else {"type": kind, **found}

    def set_rope_scaling(self: Any, value: Any) -> None:
        if old_code_calls():
            # Old configs assign it in __init__: nothing that their users could change.
            self.rope_parameters = value
            if value is not None and getattr(self, "_post_init_done", False):
                self.standardize_rope_params()
        else:
            write(self, value)

    return property(rope_scaling, set_rope_scaling, own.fdel, own.__doc__)
