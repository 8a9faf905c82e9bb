"""Which tokens a cache holds: what is known of them, and how they compare with a prompt."""

from abc import ABC, abstractmethod

import torch

from mnemon.hf.base import CacheFacade
from mnemon.token_log import PADDING, UNKNOWN, TokenLog

__all__ = ["NamedTokens"]


class NamedTokens(CacheFacade, ABC):
    """A cache that keeps a log of the tokens behind its keys and values."""

    _log: TokenLog

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens seen."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Rows; -1 while empty."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 ``[batch, num_tokens]`` on the CPU; -1 was filled by hand, -2 is padding."""
        self._match_log_rows()
        return self._log.tensor(self.num_tokens, self.batch_size)

    def _match_log_rows(self) -> None:
        """A log of one row serves all rows, as the layers' one row did."""
        if self._log.batch_size == 1 and self.batch_size > 1:
            self._log.gather(torch.zeros(self.batch_size, dtype=torch.int64))

    @property
    def num_known_tokens(self) -> int:
        """Positions whose token is known in every row."""
        return int((self.tokens != UNKNOWN).all(dim=0).sum())

    @property
    def num_recorded(self) -> int:
        """Leading positions that the log covers, named or not."""
        return min(len(self._log), self.num_tokens)

    def record_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, start: int
    ) -> None:
        """Name the tokens that a forward just added.

        Args:
            input_ids: int ``[batch, new]``.
            attention_mask: ``[batch, new]`` of those positions; 0 is padding.
            start: position of the first one.
        """
        self._log.record(input_ids, attention_mask, start)

    def common_prefix(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> int:
        """Leading positions at which every row agrees with `input_ids` ``[batch, tokens]``.

        A cache of one row is compared with every row. Unknown positions agree with anything.
        """
        held = self.tokens
        ids = input_ids.detach().to("cpu", torch.int64)
        if attention_mask is not None and attention_mask.shape == ids.shape:
            ids = ids.masked_fill(attention_mask.cpu() == 0, PADDING)
        length = min(held.shape[1], ids.shape[1])
        if held.shape[0] not in (1, ids.shape[0]) or not length:
            return 0
        held, ids = held[:, :length], ids[:, :length]
        agree = ((held == ids) | (held == UNKNOWN)).all(dim=0)
        return length if bool(agree.all()) else int(agree.to(torch.int64).argmin())

    def attention_mask(self) -> torch.Tensor:
        """int64 ``[batch, num_tokens]``: 0 where a row is padding, as after `merge`."""
        return (self.tokens != PADDING).to(torch.int64)
