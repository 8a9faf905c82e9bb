"""The bundled DiT's shape, and how it becomes a diffusers pipeline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mnemon.diffusion.digits.data import SIDE
from mnemon.errors import DependencyError, ZooError

if TYPE_CHECKING:
    from diffusers import DiTPipeline, DiTTransformer2DModel

__all__ = [
    "SIZES",
    "Objective",
    "build_pipeline",
    "build_transformer",
    "bundled_path",
    "load_pipeline",
]

Objective = Literal["epsilon", "flow"]

# One pixel is one token: 64 tokens an image. "large" is for a GPU.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 6},
    "base": {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 8},
    "large": {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12},
}


def build_transformer(size: str = "base", *, seed: int = 0) -> DiTTransformer2DModel:
    """A fresh `DiTTransformer2DModel` for 8 x 8 images of one channel.

    Args:
        size: a key of `SIZES`.
        seed: of the initial weights.

    Raises:
        ZooError: no such size.
        DependencyError: diffusers is not installed.

    Source: DiT (arXiv 2212.09748): adaptive norms begin at zero, blocks as identities.
    """
    if size not in SIZES:
        raise ZooError(f"size {size!r} came; expected one of {', '.join(SIZES)}")
    try:
        from diffusers import DiTTransformer2DModel
    except ModuleNotFoundError as error:
        raise DependencyError(
            "diffusers is not installed; pip install 'mnemon[diffusion]'"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            **SIZES[size],
            in_channels=1,
            out_channels=1,
            sample_size=SIDE,
            patch_size=1,
            norm_num_groups=1,
            # The pipeline says "no class" with the number 1000.
            num_embeds_ada_norm=1000,
        )
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    # Its label embedding would drop labels in training, other ones in each block.
    model.eval()
    return model


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def build_pipeline(transformer: nn.Module, objective: Objective = "epsilon") -> DiTPipeline:
    """A `DiTPipeline` of this transformer, with DDIM for "epsilon".

    For "flow" it can be saved and loaded, but not called: see `sample_flow`.
    """
    from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler

    from mnemon.diffusion.digits.pixels import identity_vae

    scheduler: Any = (
        DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
        if objective == "epsilon"
        else FlowMatchEulerDiscreteScheduler()
    )
    pipe = DiTPipeline(transformer=transformer, vae=identity_vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bundled_path() -> Path:
    """The folder of the shipped pipeline, as ``DiTPipeline.from_pretrained`` takes it.

    Raises:
        ZooError: this installation has no weights.
    """
    folder = Path(__file__).parent / "models" / "dit-digits"
    if not (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file():
        raise ZooError(
            "the bundled DiT has no weights in this installation; reinstall mnemon, or train it "
            "with python -m mnemon.diffusion.digits.train"
        )
    return folder


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    from diffusers.utils import logging

    # A bar for three files of a few megabytes only pushes away what the user wants to read.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pipeline(path: str | os.PathLike[str] | None = None) -> DiTPipeline:
    """A saved pipeline in float32; without a path the bundled one. Progress bars are off.

    Raises:
        ZooError: there is none at `path`.
        DependencyError: diffusers is not installed.
    """
    folder = bundled_path() if path is None else Path(path).expanduser()
    if not (folder / "model_index.json").is_file():
        raise ZooError(
            f"{os.fspath(folder)} has no model_index.json; give the folder of a saved DiTPipeline"
        )
    if (folder / "moe.json").is_file():
        raise ZooError(
            f"{os.fspath(folder)} has mixtures of experts, which DiTPipeline would replace by "
            "random feed-forwards; load it with mnemon.diffusion.diffmoe.load_moe"
        )
    try:
        from diffusers import DiTPipeline
    except ModuleNotFoundError as error:
        raise DependencyError(
            "diffusers is not installed; pip install 'mnemon[diffusion]'"
        ) from error
    with _quiet_loading():
        # float32, whatever was saved
        pipe = DiTPipeline.from_pretrained(os.fspath(folder), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
