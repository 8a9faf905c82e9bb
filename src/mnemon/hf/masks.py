"""The masks that go with mnemon's attention, registered under the same names.

transformers builds masks by the name of the attention function. A name without a mask function
gets no mask at all, and left padding is then ignored without a word; so the two are registered
together, and each name hands out what the implementation that it stands in for hands out.
"""

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

__all__ = ["ATTENTION_NAME", "EAGER_NAME", "register_masks"]

ATTENTION_NAME = "mnemon"
"""Stands in for "sdpa": bool masks, and None where causality or nothing at all says the same."""

EAGER_NAME = "mnemon_eager"
"""Stands in for "eager" (soft-capping, sinks): additive masks."""


def attention_mask(**sizes: Any) -> torch.Tensor | None:
    """The bool mask that "sdpa" would get, None where it would get None."""
    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**sizes)
    return mask


def eager_attention_mask(**sizes: Any) -> torch.Tensor | None:
    """The additive mask that "eager" would get."""
    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["eager"](**sizes)
    return mask


def register_masks() -> None:
    """Register both mask functions with transformers; doing it again changes nothing."""
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
    AttentionMaskInterface.register(EAGER_NAME, eager_attention_mask)
