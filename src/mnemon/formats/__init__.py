"""How keys and values are stored in few bits: schemes, bytes, and the view that attention reads.

Imports torch, `errors` and `types` only; knows no cache layer and no attention.

    scheme     what a format is: code, axis of the groups, rotation; its size in bytes
    quantize   numbers <-> codes and scales, in exact float32 arithmetic
    layout     codes and scales <-> the bytes of a block of 64 tokens
    hadamard   the rotation that spreads outliers over a head
    sides      keys or values of a layer as they lie in memory, and what attention reads of them
    view       a tensor that carries packed data and looks like its dense numbers
"""

from mnemon.formats.hadamard import rotate
from mnemon.formats.layout import dequantize_blocks, quantize_blocks
from mnemon.formats.scheme import BLOCK_TOKENS, CODES, Scheme, default_scheme
from mnemon.formats.sides import PackedHalf, PackedSide
from mnemon.formats.view import PackedTensor

__all__ = [
    "BLOCK_TOKENS",
    "CODES",
    "PackedHalf",
    "PackedSide",
    "PackedTensor",
    "Scheme",
    "default_scheme",
    "dequantize_blocks",
    "quantize_blocks",
    "rotate",
]
