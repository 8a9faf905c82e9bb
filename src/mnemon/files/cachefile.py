"""`cache.save(path)` and `mnemon.load_cache(path, model)`."""

import json
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from mnemon import __version__
from mnemon.cache import Cache, CacheState
from mnemon.errors import DamagedFile, FileError, NewerVersion, RecipeError, WrongModel
from mnemon.files.header import naming
from mnemon.files.lazy import defer
from mnemon.files.tensors import TensorFile, write_tensors
from mnemon.hf.fingerprint import Fingerprint, config_fingerprint, fingerprint
from mnemon.layers import CacheLayer, LayerState
from mnemon.recipe import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_cache", "save_cache"]

Verify = Literal["auto", "eager", "lazy"]
_GROUPS = ("layers", "cross_layers")
_MAX_DEPTH = 4  # of parts within parts; hybrids have one level


def save_cache(
    cache: Cache, path: str | os.PathLike[str], *, model: "PreTrainedModel | None" = None
) -> None:
    """Writes a cache to one safetensors file, whole or not at all.

    The file names the model: its config, dtype and a hash of sampled weights. Weights are known
    when `model` is given or the cache was filled through `mnemon.attach` or `mnemon.prefill`;
    otherwise the file says so, and `load_cache` warns.

    Args:
        cache: any cache, empty ones included; it is not changed.
        path: where to; an existing file is replaced once the new one is safely on disk.
        model: the model that filled the cache.

    Raises:
        FileError: the file cannot be written; an old file at `path` is intact.
    """
    state = cache.to_state()
    tensors: dict[str, torch.Tensor] = {"tokens": _narrow(state.tokens)}
    contents: dict[str, Any] = {"meta": state.meta, "num_known_tokens": cache.num_known_tokens}
    for name, states in zip(_GROUPS, (state.layers, state.cross), strict=True):
        contents[name] = [_describe(s, f"{name}.{i}", tensors) for i, s in enumerate(states)]
    metadata = {
        "mnemon_version": __version__,
        "recipe": str(cache.recipe),
        "model": _to_json(_fingerprint_of(cache, model, tensors).to_dict()),
        "cache": _to_json(contents),
    }
    write_tensors(path, tensors, metadata)


def load_cache(
    path: str | os.PathLike[str], model: "PreTrainedModel", *, verify: Verify = "auto"
) -> Cache:
    """Reads a cache that `cache.save` wrote, for the model that filled it.

    A file of more than 64 MiB is mapped, not read: its pages are read when a layer is first used,
    and on a CPU the layer keeps using them until it is written to. The file is never changed, and
    may be replaced or deleted meanwhile (overwriting it in place is another matter, as with any
    mapped file).

    Args:
        path: a file written by `cache.save`.
        model: the model to use it with; the cache is put on its device.
        verify: when the tensors' checksums are compared: ``"eager"`` all before returning,
            ``"lazy"`` each layer's when it is first used, ``"auto"`` eager up to 64 MiB. No
            number is ever used before; on an accelerator everything is copied, hence eager.

    Returns:
        A cache as it was saved: numbers, tokens, lengths, recipe.

    Raises:
        NotACacheFile, UnsafeFile, TruncatedFile, DamagedFile, NewerVersion: what is wrong with
            the file; with ``"lazy"``, `DamagedFile` also at the first use of a layer.
        WrongModel: another config, dtype or other weights.
        ModelError: the model's weights cannot be compared.
    """
    if verify not in ("auto", "eager", "lazy"):
        raise FileError(f"verify={verify!r} came; expected 'auto', 'eager' or 'lazy'.")
    file = TensorFile(path)
    with naming(file.path):
        return _load(file, model, verify)


def _load(file: TensorFile, model: "PreTrainedModel", verify: Verify) -> Cache:
    found = Fingerprint.from_dict(file.header.json("model"))
    _check_model(file.path, found, model)
    lazy = verify == "lazy" or (verify == "auto" and file.is_mapped)
    lazy = lazy and model.device.type == "cpu"
    file.check(*(["tokens"] if lazy else file.header.tensors))
    try:
        recipe = parse(file.header.metadata.get("recipe", ""))
        cache = Cache.from_state(model.config, recipe, _read_state(file, model.device))
    except FileError:
        raise
    except RecipeError as error:
        raise NewerVersion(
            f"the cache's recipe is not known here ({error}); upgrade mnemon (the "
            f"file was written by {file.header.metadata.get('mnemon_version', '?')[:40]})"
        ) from error
    except Exception as error:
        # Anything at all can break here: the digest of a hostile file can be right.
        raise DamagedFile(
            f"the contents do not fit the model or contradict one another ({error}); "
            "compute the cache again"
        ) from error
    if lazy:
        for group, name in zip(cache._groups(), _GROUPS, strict=False):
            for index, layer in enumerate(group):
                _check_at_first_use(layer, file, f"{name}.{index}.")
    if found.weights is not None:
        cache.filled_by = weakref.ref(model)
    return cache


def _check_at_first_use(layer: CacheLayer, file: TensorFile, prefix: str) -> None:
    names = [name for name in file.header.tensors if name.startswith(prefix)]
    if names:
        defer(layer, lambda: file.check(*names))


def _fingerprint_of(
    cache: Cache, model: "PreTrainedModel | None", tensors: Mapping[str, torch.Tensor]
) -> Fingerprint:
    if model is None and cache.filled_by is not None:
        model = cache.filled_by()
    if model is not None:
        return fingerprint(model)
    # Keys have the model's dtype; states beside them may be wider.
    keys = (tensor.dtype for name, tensor in tensors.items() if name.endswith(".keys"))
    return config_fingerprint(cache.config, next(keys, None))


def _check_model(path: str, found: Fingerprint, model: "PreTrainedModel") -> None:
    expected = fingerprint(model)
    differences = found.differences(expected)
    if differences and found.weights is None:
        # A cache made by hand may have been given the text part of a multimodal config.
        text = config_fingerprint(model.config.get_text_config(decoder=True), model.dtype)
        differences = found.differences(text) and differences
    if differences:
        shown = "; ".join(differences[:5]) + (" ..." if len(differences) > 5 else "")
        raise WrongModel(
            f"the cache is of another model ({found.model_type} {found.name!r}) than the "
            f"one given ({expected.model_type} {expected.name!r}): {shown}. Load it with the "
            "model that filled it, or compute it again"
        )
    if found.weights is None:
        warnings.warn(
            f"{path}: the file does not say which weights filled the cache, so only the config was "
            "compared; fill caches through mnemon.attach(model), or cache.save(path, model=model)",
            UserWarning,
            stacklevel=4,
        )


def _narrow(tokens: torch.Tensor) -> torch.Tensor:
    """Token ids in four bytes, as all vocabularies allow."""
    narrow = tokens.to(torch.int32)
    return narrow if torch.equal(narrow.to(tokens.dtype), tokens) else tokens


def _to_json(found: Mapping[str, Any]) -> str:
    try:
        return json.dumps(found, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"the cache's notes or facts are no JSON ({error}), which a file can hold; put text, "
            "numbers, lists and dicts there"
        ) from error


def _describe(state: LayerState, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A layer's state without its tensors, which go to `tensors` under ``prefix.name``.

    One tensor under two names (keys that are the values too) is written once.
    """
    first: dict[int, str] = {}
    for name, tensor in state.tensors.items():
        if first.setdefault(id(tensor), name) == name:
            tensors[f"{prefix}.{name}"] = tensor
    same = {n: first[id(t)] for n, t in state.tensors.items() if first[id(t)] != n}
    parts = [_describe(p, f"{prefix}.parts.{i}", tensors) for i, p in enumerate(state.parts)]
    return {
        "kind": state.kind,
        "meta": dict(state.meta),
        "tensors": list(state.tensors),
        "same": same,
        "parts": parts,
    }


def _read_state(file: TensorFile, device: torch.device) -> CacheState:
    """The inverse of what `save_cache` wrote.

    Raises:
        DamagedFile: the description of the layers cannot be what mnemon wrote.
    """
    contents: Any = file.header.json("cache")
    unused = set(file.header.tensors)
    if not isinstance(contents, dict) or not isinstance(contents.get("meta"), dict):
        raise _undescribed(file, "cache")
    groups: dict[str, tuple[LayerState, ...]] = {}
    for name in _GROUPS:
        if not isinstance(contents.get(name), list):
            raise _undescribed(file, name)
        groups[name] = tuple(
            _read_layer(file, layer, f"{name}.{index}", unused, device)
            for index, layer in enumerate(contents[name])
        )
    if unused != {"tokens"}:
        raise _undescribed(file, str(sorted(unused)[:3]))
    tokens = file.tensor("tokens")
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise _undescribed(file, f"tokens ({tokens.dtype} {list(tokens.shape)})")
    return CacheState(
        layers=groups["layers"],
        cross=groups["cross_layers"],
        tokens=tokens.to(torch.int64, copy=True),
        meta=contents["meta"],
    )


def _read_layer(
    file: TensorFile, found: Any, prefix: str, unused: set[str], device: torch.device
) -> LayerState:
    expected = {"kind": str, "meta": dict, "tensors": list, "same": dict, "parts": list}
    if prefix.count(".parts.") > _MAX_DEPTH or not isinstance(found, dict):
        raise _undescribed(file, prefix)
    if any(not isinstance(found.get(key), kind) for key, kind in expected.items()):
        raise _undescribed(file, prefix)
    tensors: dict[str, torch.Tensor] = {}
    for name in found["tensors"]:
        full, original = f"{prefix}.{name}", str(found["same"].get(str(name)))
        if original in tensors and name not in tensors:
            tensors[name] = tensors[original]
        elif full in unused:
            unused.remove(full)
            tensors[name] = file.tensor(full).to(device)
        else:
            raise _undescribed(file, full)
    parts = [
        _read_layer(file, part, f"{prefix}.parts.{index}", unused, device)
        for index, part in enumerate(found["parts"])
    ]
    return LayerState(kind=found["kind"], tensors=tensors, meta=found["meta"], parts=tuple(parts))


def _undescribed(file: TensorFile, what: str) -> DamagedFile:
    return DamagedFile(
        f"{what[:120]!r} is not described as mnemon describes it, or twice, or not "
        "there; compute the cache again"
    )
