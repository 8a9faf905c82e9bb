"""Which model a cache belongs to: its config, its dtype and a sample of its weights.

Keys and values mean something to the weights that computed them and to no others. Comparing all
weights would read gigabytes, so a few numbers of every tensor are hashed: a fine-tune, another
checkpoint or another adapter changes nearly all of them. A change of single numbers is not seen.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mnemon.errors import DamagedFile, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemon.hf.names import PreTrainedConfig

__all__ = ["Fingerprint", "config_fingerprint", "fingerprint"]

_MAX_TENSORS = 1024
_SAMPLES = 32

# What a config also says: where it came from, how it is run or trained, how text is generated.
# None of it changes what a model keeps between two forward passes.
_VOLATILE = frozenset(
    "architectures attn_implementation auto_map chunk_size_feed_forward dtype "
    "experts_implementation gradient_checkpointing id2label initializer_factor "
    "initializer_range label2id num_labels output_attentions output_hidden_states "
    "output_router_logits pretraining_tp problem_type return_dict router_aux_loss_coef "
    "task_specific_params tokenizer_class torch_dtype transformers_version use_cache".split()
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What must be equal for a model to read another's cache.

    Args:
        model_type: transformers' name of the architecture.
        dtype: of the model's floating point weights, such as ``"bfloat16"``; empty if unknown.
        config: the part of the config that shapes the computation, as canonical JSON.
        weights: hash of the sampled weights; None when no model was at hand, only its config.
        name: where the model came from; for people, not compared.
    """

    model_type: str
    dtype: str
    config: str
    weights: str | None = None
    name: str = field(default="", compare=False)

    @property
    def config_hash(self) -> str:
        """A short name of the config, in hexadecimal."""
        return hashlib.blake2b(self.config.encode(), digest_size=8).hexdigest()

    def matches(self, other: Self) -> bool:
        """Whether a cache of one may be used by the other; what is unknown matches anything."""
        return not self.differences(other)

    def differences(self, other: Self) -> list[str]:
        """What keeps a cache of `self` from being used by `other`, one phrase each."""
        found = []
        if self.model_type != other.model_type:
            found.append(f"model type {self.model_type!r} against {other.model_type!r}")
        elif self.config != other.config:
            mine, theirs = (_flatten(json.loads(f.config)) for f in (self, other))
            for key in sorted(mine.keys() | theirs.keys()):
                if mine.get(key) != theirs.get(key):
                    found.append(f"{key} {mine.get(key)!r} against {theirs.get(key)!r}")
        if self.dtype and other.dtype and self.dtype != other.dtype:
            found.append(f"dtype {self.dtype} against {other.dtype}")
        known = self.weights is not None and other.weights is not None
        if not found and known and self.weights != other.weights:
            found.append("the same config and dtype, but other weights")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the inverse of `from_dict`."""
        return {
            "model_type": self.model_type,
            "dtype": self.dtype,
            "config": json.loads(self.config),
            "weights": self.weights,
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, found: object) -> Self:
        """The inverse of `to_dict`, for what was read from a file.

        Raises:
            DamagedFile: it does not describe a model.
        """
        if isinstance(found, dict):
            texts = [found.get(key) for key in ("model_type", "dtype", "name")]
            weights, config = found.get("weights"), found.get("config")
            if all(isinstance(t, str) for t in texts) and isinstance(config, dict):
                if weights is None or isinstance(weights, str):
                    return cls(
                        model_type=found["model_type"],
                        dtype=found["dtype"],
                        config=_canonical(config),
                        weights=weights,
                        name=found["name"],
                    )
        raise DamagedFile("the model's fingerprint is unreadable; save the cache again")


def fingerprint(model: "PreTrainedModel") -> Fingerprint:
    """The fingerprint of a model: the same in every process and on every device.

    The head is left out where the model names its base: it does not touch the cache. Takes a few
    milliseconds, whatever the model's size.

    Raises:
        ModelError: the model has no config, or weights without numbers (the meta device).
    """
    base = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    if not isinstance(base, torch.nn.Module) or config is None:
        raise ModelError(
            f"A {type(model).__name__} has no config to take a fingerprint of; a transformers "
            "PreTrainedModel was expected."
        )
    return config_fingerprint(config, model.dtype, weights=_hash_weights(base))


def config_fingerprint(
    config: "PreTrainedConfig", dtype: torch.dtype | None, *, weights: str | None = None
) -> Fingerprint:
    """The fingerprint of a model of which only the config is at hand; any weights match it.

    Args:
        dtype: the model's, or its cache's; None when neither is known.
    """
    return Fingerprint(
        model_type=str(config.model_type),
        dtype="" if dtype is None else str(dtype).removeprefix("torch."),
        config=_canonical(_architecture(config.to_dict(), _volatile())),
        weights=weights,
        name=_public_name(str(getattr(config, "_name_or_path", "") or "")),
    )


def _volatile() -> frozenset[str]:
    from transformers import GenerationConfig

    settings = GenerationConfig().to_dict()
    return _VOLATILE.union(settings)


def _architecture(found: Any, volatile: frozenset[str]) -> Any:
    """`found` without what is volatile, private or unset, at every depth."""
    if isinstance(found, Mapping):
        return {
            str(key): _architecture(value, volatile)
            for key, value in found.items()
            if value is not None
            and key not in volatile
            and not str(key).startswith("_")
            and "dropout" not in str(key)
        }
    if isinstance(found, list | tuple):
        return [_architecture(value, volatile) for value in found]
    if isinstance(found, set | frozenset):
        return sorted(str(value) for value in found)
    if isinstance(found, float) and not math.isfinite(found):
        return str(found)  # JSON has no infinity; Mamba's time step limit is one
    return found if isinstance(found, str | int | float | bool | None) else str(found)


def _canonical(config: Any) -> str:
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def _flatten(found: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``"""
    if not isinstance(found, dict):
        return {prefix: found}
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _public_name(name: str) -> str:
    # A hub name says who made the model; a path says where somebody keeps it, which a file that
    # is passed on should not.
    looks_local = name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1
    return os.path.basename(name.rstrip("/")) if looks_local else name


def _hash_weights(module: torch.nn.Module) -> str:
    # state_dict holds parameters and the buffers that are saved, tied ones under every name, so
    # that tying after loading changes nothing; derived buffers (rotary tables) are left out.
    state = module.state_dict(keep_vars=True)
    named = [
        part
        for name in sorted(state)
        if isinstance(state[name], torch.Tensor)
        for part in _plain(name, state[name])
    ]
    sampled = _chosen([name for name, _ in named])
    digest = hashlib.blake2b(digest_size=16)
    for index, (name, tensor) in enumerate(named):
        if tensor.is_meta:
            raise ModelError(
                f"The weight {name!r} is on the meta device and has no numbers; load the weights "
                "(without offloading them to disk) before saving or loading a cache."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if index in sampled and tensor.numel():
            digest.update(_sample(tensor).cpu().numpy().tobytes())
    return digest.hexdigest()


def _chosen(names: list[str]) -> frozenset[int]:
    """Which tensors are sampled: all, or evenly chosen ones and the embeddings."""
    if len(names) <= _MAX_TENSORS:
        return frozenset(range(len(names)))
    even = {i * len(names) // _MAX_TENSORS for i in range(_MAX_TENSORS)}
    return frozenset(even | {i for i, name in enumerate(names) if "embed" in name})


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ordinary memory behind one weight (a quantized one may have several)."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        for inner in names:
            yield from _plain(f"{name}.{inner}", getattr(wrapper, inner))
    else:
        yield name, tensor.detach().as_subclass(torch.Tensor)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of up to `_SAMPLES` evenly strided numbers, on the tensor's device."""
    count = min(_SAMPLES, tensor.numel())
    step = max(1, (tensor.numel() - 1) // max(1, count - 1))
    # An even step would meet the same few columns of a matrix again and again.
    step -= step > 1 and step % 2 == 0
    if tensor.is_contiguous():
        picked = tensor.view(-1)[: count * step : step]
    else:
        flat = torch.arange(0, count * step, step, device=tensor.device)
        picked = tensor[torch.unravel_index(flat, tensor.shape)]
    return picked.contiguous().view(torch.uint8)
