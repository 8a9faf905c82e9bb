"""The bytes of a cache file: what a header looks like, and how a file that is none is told apart.

A cache file is an ordinary safetensors file whose header begins with five entries of fixed width,
so that a damaged header is still recognised, and every later version can be:

    0        8                                                              8+n            file end
    | n (u64) | {"__metadata__":{"format":"mnemon-cache","format_version":... |  tensors ... |
                 format, format_version, header_bytes, file_bytes, digest    8+n: a multiple of 64

`digest` covers the eight length bytes and the whole header, the digest's own 32 digits read as
zeros; the header holds a checksum of every tensor, tensors lie without holes, and `file_bytes` is
the length of the file. So no bit of the file can change unnoticed. The checksums (xxh3-128) find
accidents, they do not prove who wrote a file: everything read from one is validated as hostile.

No torch here: `mnemon inspect` reads a header without loading it.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, NoReturn

import xxhash

from mnemon.errors import (
    DamagedFile,
    FileError,
    NewerVersion,
    NotACacheFile,
    TruncatedFile,
    UnsafeFile,
)
from mnemon.files.tables import (
    ITEM_BYTES,
    ZERO_CHECKSUM,
    Json,
    TensorEntry,
    parse_json,
    validate_tables,
)

__all__ = [
    "FORMAT_VERSION",
    "Header",
    "TensorEntry",
    "build_header",
    "check_tensor",
    "lay_out",
    "naming",
    "open_for_reading",
    "read_header",
]

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 4 << 20  # JSON of this size parses to well under 100 MB of Python objects
ALIGNMENT = 64

_MAGIC = b'{"__metadata__":{"format":"mnemon-cache","format_version":"'
_PREAMBLE = re.compile(
    re.escape(_MAGIC) + rb'(\d{5})","header_bytes":"(\d{10})","file_bytes":"(\d{16})",'
    rb'"digest":"xxh3_128:([0-9a-f]{32})"'
)


def _preamble(version: int, header_bytes: int, file_bytes: int) -> bytes:
    fields = f'{version:05}","header_bytes":"{header_bytes:010}","file_bytes":"{file_bytes:016}",'
    return _MAGIC + f'{fields}"digest":"xxh3_128:{ZERO_CHECKSUM}"'.encode()


_PREAMBLE_BYTES = len(_preamble(0, 0, 0))
_DIGEST_AT = _PREAMBLE_BYTES - 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says before its tensors; `data_begin` is the file offset of the first tensor."""

    version: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    data_begin: int
    file_bytes: int

    def json(self, key: str) -> Json:
        """The metadata entry `key`, parsed; an absent or unreadable one is a `DamagedFile`."""
        if key not in self.metadata:
            raise DamagedFile(f"the header has no {key!r} entry; save the cache again")
        return parse_json(self.metadata[key].encode(), what=f"the header's {key!r} entry")


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[TensorEntry]:
    """Places (name, dtype, shape) without holes, widest items first, so that each is aligned."""
    entries: list[TensorEntry] = []
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -ITEM_BYTES[t[1]]):
        end = at + ITEM_BYTES[dtype] * math.prod(shape)
        entries.append(TensorEntry(name=name, dtype=dtype, shape=shape, begin=at, end=end))
        at = end
    return entries


def build_header(metadata: Mapping[str, str], entries: Sequence[TensorEntry]) -> bytes:
    """The length field and header of a file with these tensors.

    The length does not depend on the checksums, so a first header can be built before the tensors
    are written and hashed, and be replaced afterwards.

    Raises:
        FileError: the header would be larger than any reader accepts.
    """
    rest: dict[str, Json] = {
        "__metadata__": {
            **metadata,
            "checksums": json.dumps({e.name: e.checksum for e in entries}, separators=(",", ":")),
        }
    }
    for e in entries:
        rest[e.name] = {
            "dtype": e.dtype,
            "shape": list(e.shape),
            "data_offsets": [e.begin, e.end],
        }
    tail = json.dumps(rest, separators=(",", ":"), allow_nan=False).encode()
    tail = b"," + tail.removeprefix(b'{"__metadata__":{')
    size = _PREAMBLE_BYTES + len(tail)
    size += -(8 + size) % ALIGNMENT
    if size > MAX_HEADER_BYTES:
        raise FileError(
            f"the cache's header would take {size} bytes, at most {MAX_HEADER_BYTES} are allowed; "
            "keep bulky state in tensors, not in meta"
        )
    file_bytes = 8 + size + max((e.end for e in entries), default=0)
    preamble = _preamble(FORMAT_VERSION, size, file_bytes)
    header = bytearray(size.to_bytes(8, "little") + (preamble + tail).ljust(size))
    digest = xxhash.xxh3_128_hexdigest(bytes(header))
    header[8 + _DIGEST_AT : 8 + _DIGEST_AT + 32] = digest.encode()
    return bytes(header)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the path before the message of a `FileError`, unless it is there already."""
    try:
        yield
    except FileError as error:
        if str(error).startswith(f"{os.fspath(path)}: "):
            raise
        raise type(error)(f"{os.fspath(path)}: {error}") from error.__cause__


@contextlib.contextmanager
def open_for_reading(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], Header]]:
    """An open cache file, positioned at its tensors, and its header.

    Raises:
        FileError: by subclass, whatever is wrong; the message begins with the path.
    """
    shown = os.path.expanduser(os.fspath(path))
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write to it.
        descriptor = os.open(shown, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotACacheFile(f"{shown}: no such file; check the path") from None
    except OSError as error:
        raise FileError(f"{shown}: cannot be opened ({error.strerror}); check the path") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise NotACacheFile(f"{shown}: this is {kind}; give the path of a saved cache")
    with open(descriptor, "rb") as file, naming(shown):
        yield file, read_header(file, found.st_size)


def read_header(file: IO[bytes], size: int) -> Header:
    """Reads and validates the header of an open file of `size` bytes; no tensor data is read.

    Raises:
        NotACacheFile, UnsafeFile, TruncatedFile, DamagedFile, NewerVersion: see `mnemon.errors`.
    """
    start = file.read(8 + _PREAMBLE_BYTES)
    preamble = _PREAMBLE.fullmatch(start[8:])
    if preamble is None:
        _refuse(start, file, size)
    version, header_bytes, file_bytes = (int(preamble[i]) for i in (1, 2, 3))
    if int.from_bytes(start[:8], "little") != header_bytes:
        raise DamagedFile("the header's two length fields differ; restore the file or save again")
    if header_bytes > MAX_HEADER_BYTES or header_bytes < _PREAMBLE_BYTES:
        raise DamagedFile(
            f"a header of {header_bytes} bytes came, {_PREAMBLE_BYTES} to {MAX_HEADER_BYTES} were "
            "expected; restore the file or save again"
        )
    raw = start[8:] + file.read(header_bytes - _PREAMBLE_BYTES)
    if len(raw) < header_bytes:
        raise TruncatedFile(_ends_early(size, max(file_bytes, 8 + header_bytes)))
    _check_digest(start[:8], raw, version, preamble[4].decode())
    if version > FORMAT_VERSION:
        _newer(str(version))
    if size < file_bytes:
        raise TruncatedFile(_ends_early(size, file_bytes))
    if size > file_bytes:
        raise DamagedFile(
            f"the file has {size} bytes, {file_bytes} were written; something was appended: "
            "restore the file or save again"
        )
    metadata, tensors = validate_tables(raw, size - 8 - header_bytes)
    return Header(
        version=version,
        metadata=metadata,
        tensors=tensors,
        data_begin=8 + header_bytes,
        file_bytes=size,
    )


def check_tensor(entry: TensorEntry, data: memoryview) -> None:
    """Compares a tensor's bytes (`data`: the whole tensor area) with its checksum.

    Raises:
        DamagedFile: they differ.
    """
    came = xxhash.xxh3_128_hexdigest(data[entry.begin : entry.end])
    if came != entry.checksum:
        raise DamagedFile(
            f"the {entry.nbytes} bytes of {entry.name!r} are not those that were written (checksum "
            f"{came[:12]} came, {entry.checksum[:12]} was expected); restore the file or compute "
            "the cache again"
        )


def _ends_early(size: int, expected: int) -> str:
    return (
        f"the file ends after {size} bytes, {expected} were written; copy it again from its "
        "source or compute the cache again"
    )


def _newer(version: str) -> NoReturn:
    raise NewerVersion(
        f"the file has format version {version}, this mnemon reads up to {FORMAT_VERSION}; "
        "upgrade mnemon or save the cache again with this one"
    )


def _check_digest(length: bytes, raw: bytes, version: int, digest: str) -> None:
    at = _DIGEST_AT
    zeroed = length + raw[:at] + ZERO_CHECKSUM.encode() + raw[at + 32 :]
    if xxhash.xxh3_128_hexdigest(zeroed) == digest:
        return
    if version > FORMAT_VERSION:
        # A later version may hash otherwise. But if the digest fits our own version number, it is
        # the number itself that was damaged.
        at = 8 + len(_MAGIC)
        ours = zeroed[:at] + b"%05d" % FORMAT_VERSION + zeroed[at + 5 :]
        if xxhash.xxh3_128_hexdigest(ours) != digest:
            _newer(str(version))
    raise DamagedFile(
        "the header is not the one that was written (its digest differs); restore the file or "
        "compute the cache again"
    )


def _refuse(start: bytes, file: IO[bytes], size: int) -> NoReturn:
    """Says what a file is that does not begin like a cache."""
    if size == 0:
        raise NotACacheFile("the file is empty (0 bytes), a mnemon cache was expected")
    body, length = start[8:], int.from_bytes(start[:8], "little")
    known = min(len(body), len(_MAGIC))
    alike = sum(a == b for a, b in zip(body, _MAGIC, strict=False))
    if len(body) < _PREAMBLE_BYTES and alike == known and start[0] % ALIGNMENT == ALIGNMENT - 8:
        raise TruncatedFile(_ends_early(size, 8 + length if len(start) >= 8 else 8))
    if known and alike >= 0.9 * len(_MAGIC):
        # Another program that rewrites the file may keep the entries' order, but not their widths.
        _refuse_newer(_parsed(file, size, length))
        raise DamagedFile(
            "the first bytes are almost, but not quite, those of a mnemon cache; restore the file "
            "or compute the cache again"
        )
    if body[:1] == b"{":
        _refuse_safetensors(file, size, length)
    if start[:2] == b"PK" or (start[0] == 0x80 and len(start) > 1 and start[1] in range(2, 6)):
        what = "a zip archive, as torch.save writes" if start[:2] == b"PK" else "a pickle"
        raise UnsafeFile(
            f"the file is {what}; loading one can run any code, so it was not opened. A cache is "
            "saved with cache.save(path)"
        )
    raise NotACacheFile(
        f"the file begins with {start[:16]!r}, which is no mnemon cache; a cache is saved with "
        "cache.save(path)"
    )


def _refuse_safetensors(file: IO[bytes], size: int, length: int) -> NoReturn:
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise NotACacheFile(
            f"the file looks like safetensors, but claims a header of {length} bytes in a file of "
            f"{size} (at most {MAX_HEADER_BYTES} are read); it is no usable cache"
        )
    header = _parsed(file, size, length)
    if isinstance(header, DamagedFile):
        raise NotACacheFile(f"the file looks like safetensors, but {header}") from None
    found = header if isinstance(header, dict) else {}
    metadata = found.get("__metadata__")
    if isinstance(metadata, dict) and metadata.get("format") == "mnemon-cache":
        _refuse_newer(header)
        raise DamagedFile(
            "the header of this cache was rewritten by another program, so its digest cannot be "
            "checked; keep the file as cache.save(path) wrote it"
        )
    names = [name for name in found if name != "__metadata__"]
    raise NotACacheFile(
        f"the file is safetensors with {len(names)} tensors ({', '.join(names[:3])[:120]} ...), "
        "but not a mnemon cache; are these a model's weights?"
    )


def _parsed(file: IO[bytes], size: int, length: int) -> Json | DamagedFile:
    """The header as JSON, or what is wrong with it; too long a one is not read."""
    if length > min(size - 8, MAX_HEADER_BYTES):
        return DamagedFile("the header's length is not possible")
    file.seek(8)
    try:
        return parse_json(file.read(length), "the header")
    except DamagedFile as error:
        return error


def _refuse_newer(header: Json | DamagedFile) -> None:
    """Raises `NewerVersion` if this parsed header says that it is one of a later format."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if isinstance(version, str) and version.isdecimal() and 0 < len(version) < 10:
        if int(version) > FORMAT_VERSION:
            _newer(version)
