"""Attention over tensors: the oracle, the grouped decode path, and the choice between them.

Functions here take tensors, never caches, and keep no state.

    reference   plain float64 maths, what every other function is measured against
    grouped     query heads that share a key head become rows of one product: keys are read once
    dispatch    ``attend``: picks the path by shape, right for every option
"""

from mnemon.attention.dispatch import attend

__all__ = ["attend"]
