"""Every token, in the model's dtype, in memory that grows in place."""

from typing import final

from mnemon.layers.storage import TokenBuffer
from mnemon.layers.tokens import TokenLayer

__all__ = ["DenseLayer"]


@final
class DenseLayer(TokenLayer):
    """Every token in the model's dtype; an append writes behind the live tokens, copying none.

    transformers' ``DynamicLayer`` concatenates everything on every token. All verbs work.
    """

    kind = "dense"

    def _new_buffer(self) -> TokenBuffer:
        return TokenBuffer()

    def _empty(self) -> "DenseLayer":
        return DenseLayer()
