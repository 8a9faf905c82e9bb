"""What tests ask about the installed transformers."""

import pytest

from mnemon.hf.versions import installed
from mnemon.hf.versions.supported import ADAPTERS, release

__all__ = ["NEVER_SAID", "NEWEST", "RELEASE", "newest_only", "since"]

RELEASE = release(installed)
NEWEST = ADAPTERS[-1][1]

#: An end of text outside every vocabulary: prompt lookup in 4.57 raises without one.
NEVER_SAID = 1_000_000

#: For what is measured on the current transformers, such as its defects.
newest_only = pytest.mark.skipif(
    RELEASE < NEWEST, reason=f"about transformers {NEWEST[0]}.{NEWEST[1]}"
)


def since(*first: int) -> pytest.MarkDecorator:
    """For what transformers has from a release on."""
    return pytest.mark.skipif(RELEASE < first, reason=f"from transformers {first[0]}.{first[1]} on")
