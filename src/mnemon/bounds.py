"""How many tokens a policy lets a layer hold. Imports no torch.

held   ────╱│  ╱│  ╱│      grows to `most`, then falls to `least`: dropping one token per step
      ╱     │╱  │╱  │╱     would move all the others at every step
"""

from typing import NamedTuple

__all__ = ["LEAST_FRACTION", "Bound"]

#: Decimal fractions of the tokens seen begin here.
LEAST_FRACTION = 0.001

_STEPS = 16  # a bound of n tokens falls by n // 16 at a drop


class Bound(NamedTuple):
    """Tokens that a layer holds at most, per row and head.

    Attributes:
        keep: tokens, or the fraction of the tokens seen.
        sinks: first tokens that are held beside them.
        every: tokens that come between two drops; None for a sixteenth of what is kept, plus one.
        score_bytes: bytes kept beside every token and key head.
    """

    keep: int | float
    sinks: int = 0
    every: int | None = None
    score_bytes: int = 0

    def most(self, num_tokens: int) -> int:
        """Tokens held at most, once `num_tokens` were seen (padding counts as seen)."""
        return self.sinks + self._kept(num_tokens)

    def least(self, num_tokens: int) -> int:
        """Tokens held right after some were dropped."""
        kept = self._kept(num_tokens)
        step = kept // _STEPS if self.every is None else self.every - 1
        return self.sinks + max(1, kept - step)

    def _kept(self, num_tokens: int) -> int:
        if isinstance(self.keep, int):
            return self.keep
        return max(1, int(self.keep * num_tokens + 1e-9))
