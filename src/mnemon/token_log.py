"""Which tokens a cache holds, so that reuse can be verified."""

from collections.abc import Sequence
from typing import Final, final

import torch

__all__ = ["PADDING", "UNKNOWN", "TokenLog"]

#: A position that nobody named: the cache was filled by hand, or from embeddings.
UNKNOWN: Final = -1
#: A position that the attention mask hides.
PADDING: Final = -2


@final
class TokenLog:
    """Token ids by position, ``[batch, tokens]``; appends are cheap, columns join when read."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def batch_size(self) -> int:
        return int(self._chunks[0].shape[0]) if self._chunks else -1

    def record(self, ids: torch.Tensor, mask: torch.Tensor | None, start: int) -> None:
        """`ids` ``[batch, new]`` now stand at positions ``start...``; `mask` 0 marks padding."""
        ids = ids.detach().to(torch.int64)
        if mask is not None and mask.ndim == 2 and mask.shape == ids.shape:
            ids = ids.masked_fill(mask.to(ids.device) == 0, PADDING)
        else:
            ids = ids.clone()  # the caller may write into its tensor later
        if start < self._length:
            self.crop_to(start)
        if self.batch_size == 1 and ids.shape[0] > 1:
            self.gather(torch.zeros(ids.shape[0], dtype=torch.int64))
        if start > self._length:
            self._add(ids.new_full((ids.shape[0], start - self._length), UNKNOWN))
        self._add(ids)

    def _add(self, ids: torch.Tensor) -> None:
        self._chunks.append(ids)
        self._length += ids.shape[1]

    def tensor(self, num_tokens: int | None = None, batch_size: int = 1) -> torch.Tensor:
        """``[batch, num_tokens]`` on the CPU; positions never recorded are `UNKNOWN`."""
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks, dim=1)]
        length = self._length if num_tokens is None else num_tokens
        if not self._chunks:
            return torch.full((max(batch_size, 1), length), UNKNOWN, dtype=torch.int64)
        ids = self._chunks[0].cpu()
        if length <= ids.shape[1]:
            return ids[:, :length]
        missing = ids.new_full((ids.shape[0], length - ids.shape[1]), UNKNOWN)
        return torch.cat([ids, missing], dim=1)

    def crop_to(self, num_tokens: int) -> None:
        """Forget positions from `num_tokens` on."""
        while self._length > num_tokens:
            last = self._chunks.pop()
            self._length -= last.shape[1]
            if self._length < num_tokens:
                self._add(last[:, : num_tokens - self._length])
        if not self._length:
            self._chunks.clear()

    def gather(self, index: torch.Tensor) -> None:
        """Row i becomes what row ``index[i]`` was."""
        if self._chunks:
            ids = torch.cat(self._chunks, dim=1) if len(self._chunks) > 1 else self._chunks[0]
            self._chunks = [ids.index_select(0, index.to(ids.device))]

    def fork(self) -> "TokenLog":
        other = TokenLog()
        other._chunks, other._length = list(self._chunks), self._length
        return other

    @classmethod
    def of(cls, ids: torch.Tensor) -> "TokenLog":
        """A log that holds `ids` ``[batch, tokens]`` as they are."""
        log = cls()
        if ids.shape[1]:
            log._add(ids.to(torch.int64))
        return log

    @classmethod
    def merge(cls, columns: Sequence[torch.Tensor]) -> "TokenLog":
        """Rows of all `columns` ``[rows, tokens]``, aligned at the newest, padded on the left."""
        longest = max(ids.shape[1] for ids in columns)
        pad = torch.nn.functional.pad
        return cls.of(
            torch.cat([pad(ids, (longest - ids.shape[1], 0), value=PADDING) for ids in columns])
        )
