"""A fingerprint of what tokens do not say: images, sounds, an encoder's input."""

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["digest"]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of named tensors (names, dtypes, shapes, bytes); "" for none.

    A mask of ones says nothing and is left out: a caller who passes it means the same as one who
    does not. Copies the tensors to the CPU.
    """
    hasher, num_hashed = hashlib.blake2b(digest_size=16), 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        if name == "attention_mask" and bool((tensor == 1).all()):
            continue
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        num_hashed += 1
    return hasher.hexdigest() if num_hashed else ""
