"""A tensor that carries packed data: mnemon's attention reads the bytes, others see numbers."""

from typing import Any, final

from torch import Tensor

from mnemon.formats.sides import PackedHalf
from mnemon.formats.stand_in import StandIn

__all__ = ["PackedTensor"]


@final
class PackedTensor(StandIn):
    """Looks like the dense keys or values ``[batch, kv_heads, num_tokens, width]``.

    Attention of mnemon reads `half`; every other torch function is given the dequantized numbers,
    made for that call. It cannot be written to.

    Args:
        half: what it stands for.
    """

    half: PackedHalf  # `Tensor.half()` calls it, and gets float16

    @staticmethod
    def __new__(cls, half: PackedHalf) -> "PackedTensor":
        tail = half.tail
        made: PackedTensor = Tensor._make_wrapper_subclass(
            cls, half.shape, dtype=tail.dtype, device=tail.device
        )
        made.half = half
        return made

    def __init__(self, half: PackedHalf) -> None:
        del half  # kept by __new__

    def dense(self) -> Tensor:
        """The numbers, dequantized: an ordinary tensor."""
        return self.half.dense()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        side = self.half.side
        scheme = "" if side is None else f", {side.scheme}"
        return f"PackedTensor({list(self.half.shape)}, {self.half.tail.dtype}{scheme})"
