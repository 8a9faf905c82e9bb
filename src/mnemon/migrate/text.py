"""A file's bytes as text and back, byte for byte: encoding, BOM, line ends, offsets."""

from __future__ import annotations

import io
import re
import tokenize
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import final

__all__ = ["Source", "decode"]

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")


@final
@dataclass(slots=True)
class Source:
    """Source text in UTF-8, in which Python's parser counts its columns.

    Args:
        utf8: the text.
        encoding: of the file on disk.
        bom: what stood before the text.
    """

    utf8: bytes
    encoding: str = "utf-8"
    bom: bytes = b""
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Only \n, \r\n and \r end a line for Python; str.splitlines knows nine more.
        self.starts = [0, *(match.end() for match in _LINE_END.finditer(self.utf8))]

    @property
    def newline(self) -> str:
        """The first line end of the text."""
        match = _LINE_END.search(self.utf8)
        return match[0].decode() if match else "\n"

    @property
    def num_lines(self) -> int:
        return len(self.starts) - (1 if self.starts[-1] == len(self.utf8) else 0)

    def offset(self, line: int, column: int) -> int:
        """Bytes before (line from 1, column in bytes from 0)."""
        return self.starts[line - 1] + column

    def position(self, offset: int) -> tuple[int, int]:
        """(line from 1, column in characters from 1) of a byte."""
        line = bisect_right(self.starts, offset)
        before = self.utf8[self.starts[line - 1] : offset]
        return line, len(before.decode("utf-8", "replace")) + 1

    def encode(self, utf8: bytes) -> bytes:
        """`utf8` as the file's bytes."""
        if self.encoding == "utf-8":
            return self.bom + utf8
        return self.bom + utf8.decode("utf-8").encode(self.encoding)


def decode(content: bytes) -> Source:
    """Read a Python file's bytes as its coding cookie or BOM says.

    Raises:
        SyntaxError: an unknown encoding, or one that contradicts the BOM.
        UnicodeDecodeError: bytes that are not in that encoding.
    """
    bom = _BOM if content.startswith(_BOM) else b""
    found = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
    encoding = "utf-8" if found == "utf-8-sig" else found
    body = content[len(bom) :]
    text = body.decode(encoding)
    utf8 = body if encoding == "utf-8" else text.encode("utf-8")
    if encoding != "utf-8" and text.encode(encoding) != body:
        raise SyntaxError(f"the bytes do not survive a round trip through {encoding}")
    return Source(utf8, encoding, bom)
