"""The handle of a cache that lies in an exported graph's own memory."""

from collections.abc import Sequence
from typing import Any, final

from mnemon.errors import ExportError

__all__ = ["HeldCache"]


@final
class HeldCache:
    """How many tokens an export of the recipe ``static(n)`` holds.

    The keys and values are in the graph. A call with ``past_key_values=None`` begins another
    sequence over them, after which this handle is refused.

    Attributes:
        num_tokens: tokens that the graph holds of this sequence.
        is_current: whether they are still there.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.batch_size = 0
        self.is_current = True
        self.cross: Sequence[Any] = ()
        self.is_updated: dict[int, bool] = {}
        self.source_mask: Any = None

    def __repr__(self) -> str:
        state = "" if self.is_current else ", gone"
        return f"HeldCache({self.num_tokens} tokens{state})"

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.num_tokens

    def crop(self, num_tokens: int) -> None:
        """Forget the newest tokens: ``crop(-n)`` takes ``n`` of them back.

        Raises:
            ExportError: a positive number, or more than there are.
        """
        if num_tokens > 0 or -num_tokens > self.num_tokens:
            raise ExportError(
                f"crop({num_tokens}): expected 0 to -{self.num_tokens}, the newest tokens to take "
                f"back."
            )
        self.num_tokens += num_tokens

    def advance(self, num_tokens: int, batch_size: int, cross: Sequence[Any]) -> None:
        """Note what a call has written."""
        self.num_tokens, self.batch_size, self.is_current = num_tokens, batch_size, True
        if cross:
            self.cross, self.is_updated = cross, {0: True}
