"""Which name of transformers' cache API is there in which release, and what to write today.

One table, without torch: the legacy shim takes its warnings from it, the codemod its texts, and the
page "which name when" (docs/names.md) is printed from it by `scripts/names_page.py`.
"""

from mnemon.errors import MnemonError
from mnemon.names.calls import CALLS
from mnemon.names.classes import CLASSES
from mnemon.names.contents import CONTENTS
from mnemon.names.lengths import LENGTHS
from mnemon.names.model import Kind, Message, Name, release

__all__ = ["NAMES", "Kind", "Message", "Name", "lookup", "release"]

NAMES: tuple[Name, ...] = (*LENGTHS, *CONTENTS, *CALLS, *CLASSES)


def lookup(key: str) -> Name:
    """The entry called `key`.

    Raises:
        MnemonError: there is none.
    """
    for name in NAMES:
        if name.key == key:
            return name
    known = ", ".join(name.key for name in NAMES)
    raise MnemonError(f"no entry {key!r} in the table of names; it has: {known}")
