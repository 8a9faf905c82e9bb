"""Small blocks that a gated recurrent cache can be put into, one kind in each file.

- `encoder`: a plain pre-norm transformer block
- `pvt`: keys and values from a reduced image (Pyramid Vision Transformer)
- `swin`: attention in windows, shifted in every second block
- `decoder`: a language model that reads segment after segment (Transformer-XL)
"""

from mnemon.memory.grc.blocks.decoder import (
    DecoderState,
    LayerState,
    RecurrentAttention,
    RecurrentDecoder,
)
from mnemon.memory.grc.blocks.encoder import EncoderBlock, FeedForward
from mnemon.memory.grc.blocks.pvt import PVTBlock, SpatialReductionAttention
from mnemon.memory.grc.blocks.swin import SwinBlock, WindowAttention

__all__ = [
    "DecoderState",
    "EncoderBlock",
    "FeedForward",
    "LayerState",
    "PVTBlock",
    "RecurrentAttention",
    "RecurrentDecoder",
    "SpatialReductionAttention",
    "SwinBlock",
    "WindowAttention",
]
