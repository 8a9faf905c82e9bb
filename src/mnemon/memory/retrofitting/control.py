"""What the attention modules of one retrofitted model share: settings, and how they decide now."""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mnemon.compression import Compression

__all__ = ["Control"]


@final
@dataclass(slots=True, kw_only=True)
class Control:
    """How the layers decide, and what they decided.

    Args:
        compression: how the cache is compressed.
        relaxed: training: decisions are relaxed and noisy, and gradients flow through them.
        neuron_left: how much of a borrowed neuron still counts in scores (1 at first, then 0).
        recording: keep every layer's decisions of the last forward in `records`.
        generator: of the noise; None is torch's own.
        records: by layer, [batch, kv_heads, tokens]: relaxed decisions in training (DMS: 0 and 1
            with the gradient of the relaxed ones), 0 and 1 otherwise.
    """

    compression: Compression
    relaxed: bool = False
    neuron_left: float = 0.0
    recording: bool = False
    generator: torch.Generator | None = None
    records: dict[int, Tensor] = field(default_factory=dict)

    def record(self, layer_idx: int, decisions: Tensor) -> None:
        """Note the decisions of one layer's forward, if somebody asked for them."""
        if self.relaxed or self.recording:
            self.records[layer_idx] = decisions

    def fraction(self) -> Tensor:
        """Mean of the recorded decisions over layers, heads and tokens: what is compressed away."""
        return torch.stack([decisions.mean() for decisions in self.records.values()]).mean()
