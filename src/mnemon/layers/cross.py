"""What a decoder layer keeps of the encoder: written once, read at every step."""

from collections.abc import Sequence
from typing import final

import torch

from mnemon.errors import CacheError, UnsupportedVerb
from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import TokenLayer

__all__ = ["CrossLayer"]


@final
class CrossLayer(TokenLayer):
    """Keys and values of an encoder, without reserve.

    `keep`, and `crop` of more than 0 tokens, raise `UnsupportedVerb`: the encoder's length is not
    the decoder's. `merge` wants encoder inputs of one length.
    """

    kind = "cross"

    def _new_buffer(self) -> TokenBuffer:
        return TokenBuffer(exact=True)

    def _empty(self) -> "CrossLayer":
        return CrossLayer()

    def can_crop(self, num_tokens: int) -> bool:
        return num_tokens == 0

    def crop(self, num_tokens: int) -> None:
        self._check_count(num_tokens)
        if num_tokens:
            raise UnsupportedVerb(
                f"A cross-attention layer holds the encoder's tokens; cannot remove {num_tokens}. "
                f"reset() it to encode another input."
            )

    def keep(self, indices: torch.Tensor) -> None:
        raise UnsupportedVerb("A cross-attention layer holds the encoder's tokens: no keep().")

    def merge(self, others: Sequence["CrossLayer"]) -> "CrossLayer":
        lengths = {layer.num_stored for layer in (self, *others)}
        if len(lengths) > 1:
            raise CacheError(
                f"Cannot merge caches of encoder inputs of lengths {sorted(lengths)}; pad the "
                f"encoder inputs to one length."
            )
        return super().merge(others)

    def extract(self, row: int, num_padding: int = 0) -> "CrossLayer":
        """Row `row`; `num_padding` counts decoder tokens, so nothing is cut here."""
        return super().extract(row)
