"""Tokens of any number to a fixed number of slots, padding left out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

__all__ = ["interpolate_tokens"]


def interpolate_tokens(
    x: Float[Tensor, "batch tokens channels"],
    length: int,
    real: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch length channels"]:
    """Linear interpolation along the tokens, of each sample's real tokens alone.

    Slot i lies at token (i + 0.5) * n / length - 0.5 of the n real tokens, kept within the first
    and the last (``align_corners=False`` of torch's `interpolate`, which is what runs without
    padding). With padding the real tokens are first moved together in their order, so that a
    sample's slots do not depend on how much padding stands before, behind or between them.

    Args:
        x: what to interpolate.
        length: slots per sample.
        real: False at padding; None where there is none.

    Returns:
        The slots; zeros for a sample without a real token.
    """
    if real is None:
        slots = functional.interpolate(x.transpose(1, 2), size=length, mode="linear")
        return slots.transpose(1, 2)
    # A stable sort brings the real tokens to the front in their order; no length leaves the
    # device, so that compiled code need not stop here.
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    count = real.sum(dim=1, keepdim=True)
    at = torch.arange(length, device=x.device, dtype=torch.float64) + 0.5
    position = at[None] * (count.to(torch.float64) / length) - 0.5
    last = (count - 1).clamp(min=0)
    position = position.clamp(min=0).minimum(last.to(torch.float64))
    low = position.floor().long()
    weight = (position - low).to(x.dtype)[..., None]
    high = (low + 1).minimum(last)

    def taken(index: Tensor) -> Tensor:
        chosen = order.gather(1, index)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, chosen)

    # A product would carry an infinity or NaN from padding; `where` does not.
    slots = (1 - weight) * taken(low) + weight * taken(high)
    return torch.where((count > 0)[..., None], slots, torch.zeros_like(slots))
