"""The codemod: old names of transformers' cache API to those of a newer release.

Decides on each place by what the receiver is, rewrites with libcst, and reports what it could not
decide. No torch, no transformers: the code that is migrated is read, never imported.
"""

from mnemon.migrate.engine import migrate_source
from mnemon.migrate.model import FileResult, Finding, Place, Problem, Replacement, Status
from mnemon.migrate.target import TARGETS, Target

__all__ = [
    "TARGETS",
    "FileResult",
    "Finding",
    "Place",
    "Problem",
    "Replacement",
    "Status",
    "Target",
    "migrate_source",
]
