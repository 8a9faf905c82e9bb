"""An autoencoder that changes nothing, for a diffusion model that works on pixels.

diffusers' `DiTPipeline` always decodes with a VAE, and loads only classes of its own. So this is
its `AutoencoderKL` with weights that are computed, not trained:

    x  ->  conv_in: (x, -x, A, -A)  ->  GroupNorm over all four: mean 0, deviation A / sqrt(2) but
    for (x / A)^2  ->  gain and bias: x + B  ->  SiLU: x + B but for (x + B) exp(-x - B)  ->  - B
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["identity_vae"]

_WIDE = 1000.0  # A: the larger, the less a pixel changes the deviation
_HIGH = 20.0  # B: the larger, the straighter SiLU is there, and the coarser float32


def identity_vae() -> AutoencoderKL:
    """An `AutoencoderKL` of one channel and factor 1 whose halves are identities.

    In float32, decoding differs from its input by less than 5e-5 for values within +-4.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        _straighten(vae.encoder, outputs=2)
        _straighten(vae.decoder, outputs=1)
        vae.encoder.conv_out.bias[1] = -30.0  # the logarithm of the variance
        vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2)
        vae.post_quant_conv.weight[0, 0, 0, 0] = 1.0
    return vae


def _straighten(half: Any, *, outputs: int) -> None:
    first: nn.Conv2d = half.conv_in
    first.weight[0, 0, 1, 1], first.weight[1, 0, 1, 1] = 1.0, -1.0
    first.bias.copy_(torch.tensor([0.0, 0.0, _WIDE, -_WIDE]))  # type: ignore[union-attr]
    norm: nn.GroupNorm = half.conv_norm_out
    norm.weight[0], norm.bias[0] = _WIDE * 0.5**0.5, _HIGH
    last: nn.Conv2d = half.conv_out
    assert last.out_channels == outputs
    last.weight[0, 0, 1, 1], last.bias[0] = 1.0, -_HIGH  # type: ignore[index]
