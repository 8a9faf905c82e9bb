"""What every cache layer is compared with: lists of tokens in float64, no torch cleverness.

A token is a tensor ``[heads, width]``; `None` stands for padding that `merge` put on the left.
"""

from collections.abc import Sequence

import torch

__all__ = ["HEADS", "WIDTH", "Oracle", "Token", "tokens"]

HEADS, WIDTH = 2, 7
Token = torch.Tensor | None


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    """``[batch, count, heads, width]`` of small integers, which every float dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, count, HEADS, WIDTH)
    return torch.randint(-60, 61, shape, generator=generator).to(torch.float64)


class Oracle:
    """Rows of stored tokens, and how many were seen."""

    def __init__(self, rows: Sequence[list[Token]] = (), seen: int = 0) -> None:
        self.rows = [list(row) for row in rows]
        self.seen = seen

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    @property
    def stored(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def dropped(self) -> int:
        """Tokens that `keep` let go; the older ones, as far as positions are concerned."""
        return self.seen - self.stored

    def append(self, new: torch.Tensor) -> None:
        if not self.rows:
            self.rows = [[] for _ in new]
        if len(self.rows) == 1:
            self.rows = [list(self.rows[0]) for _ in new]
        assert len(self.rows) == len(new)
        for row, added in zip(self.rows, new, strict=True):
            row.extend(token.clone() for token in added)
        self.seen += new.shape[1]

    def crop(self, count: int) -> None:
        for row in self.rows:
            del row[len(row) - count :]
        self.seen -= count

    def select(self, index: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in index]

    def repeat(self, repeats: int) -> None:
        self.rows = [list(row) for row in self.rows for _ in range(repeats)]

    def keep(self, index: Sequence[int]) -> None:
        self.rows = [[row[position] for position in index] for row in self.rows]

    def keep_per_head(self, index: torch.Tensor) -> None:
        """`index` ``[batch, heads, kept]``."""
        kept_rows: list[list[Token]] = []
        for row, per_head in zip(self.rows, index.tolist(), strict=True):
            kept: list[Token] = []
            for positions in zip(*per_head, strict=True):
                one = [_dense(row[position])[head] for head, position in enumerate(positions)]
                kept.append(torch.stack(one))
            kept_rows.append(kept)
        self.rows = kept_rows

    def merge(self, others: Sequence["Oracle"]) -> "Oracle":
        group = [self, *others]
        longest = max(one.stored for one in group)
        rows = [[None] * (longest - one.stored) + row for one in group for row in one.rows]
        return Oracle(rows, longest)

    def extract(self, row: int, num_padding: int = 0) -> "Oracle":
        return Oracle([self.rows[row][num_padding:]], self.seen - num_padding)

    def fork(self) -> "Oracle":
        return Oracle(self.rows, self.seen)

    def dense(self, first: int = 0) -> torch.Tensor:
        """Stored tokens from number `first` on, ``[batch, tokens, heads, width]``; padding is 0."""
        rows = [[_dense(token) for token in row[first:]] for row in self.rows]
        if not rows or not rows[0]:
            return torch.zeros(len(rows), 0, HEADS, WIDTH, dtype=torch.float64)
        return torch.stack([torch.stack(row) for row in rows])


def _dense(token: Token) -> torch.Tensor:
    return torch.zeros(HEADS, WIDTH, dtype=torch.float64) if token is None else token
