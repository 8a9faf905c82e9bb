"""Preallocated keys and values, for ``torch.compile``."""

from typing import final

import torch

from mnemon.layers.static_storage import StaticBuffer
from mnemon.layers.tokens import TokenLayer

__all__ = ["StaticLayer"]


@final
class StaticLayer(TokenLayer):
    """`max_tokens` tokens at a fixed address; attention reads the whole buffer under a mask.

    All verbs work; a token more than fits raises `CapacityError`; a fork copies at once, because
    the address is what a compiled graph holds on to.

    Args:
        max_tokens: tokens that fit.
        is_sliding: the model masks this layer with a window (that is no shorter than the buffer).
    """

    kind = "static"
    is_compileable = True

    def __init__(self, max_tokens: int, *, is_sliding: bool = False) -> None:
        self.max_tokens = max_tokens
        self.is_sliding = is_sliding
        super().__init__()

    def _new_buffer(self) -> StaticBuffer:
        return StaticBuffer(self.max_tokens)

    def _empty(self) -> "StaticLayer":
        return StaticLayer(self.max_tokens, is_sliding=self.is_sliding)

    @property
    def max_length(self) -> int:
        return self.max_tokens

    @property
    def length_at_hand(self) -> int | None:
        assert isinstance(self._keys, StaticBuffer)
        return self.num_tokens if self._keys.is_length_known else None

    def traced_length(self) -> int | torch.Tensor:
        assert isinstance(self._keys, StaticBuffer)
        counter = self._keys.counter
        if torch.compiler.is_compiling() and counter is not None:
            return counter + self._dropped if self._dropped else counter
        return self.num_tokens
