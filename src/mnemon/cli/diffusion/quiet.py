"""Silence for what packages say while they are measured."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

__all__ = ["quiet_diffusers"]


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No warnings of diffusers and of caches inside; a table is no place for them."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
