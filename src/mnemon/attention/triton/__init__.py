"""Attention on a GPU in Triton: decoding over dense and packed caches, contiguous or paged.

    support   whether Triton is there, and what is served
    decode    the door: arguments as `mnemon.attention.attend` takes them
    launch    tile sizes, strides, scratch
    dense, packed, combine, scores, blocks    the kernels; importing one imports triton
    packing   quantizing blocks and taking them apart on the device

Nothing here imports triton before a kernel is started.
"""

from mnemon.attention.triton.decode import decode
from mnemon.attention.triton.packing import pack_blocks, unpack_blocks
from mnemon.attention.triton.support import is_available, supports

__all__ = ["decode", "is_available", "pack_blocks", "supports", "unpack_blocks"]
