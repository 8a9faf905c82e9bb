"""Reading a header's tables without believing them: a digest can be forged along with the rest."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mnemon.errors import DamagedFile

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_MAX_DIMS = 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
ZERO_CHECKSUM = "0" * 32

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: `begin` and `end` count bytes from the start of the tensor data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: str = ZERO_CHECKSUM

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


def parse_json(text: bytes, what: str) -> Json:
    """JSON without duplicate names, NaN or bottomless nesting; else `DamagedFile`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(  # type: ignore[no-any-return]
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse
        )
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{what} is not valid JSON ({error}); save the cache again") from None


def validate_tables(raw: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The metadata and the tensor table of a header, for a file with `data_bytes` of tensors.

    Raises:
        DamagedFile: a name, dtype, shape or range cannot be what mnemon wrote.
    """
    header = parse_json(raw, "the header")
    assert isinstance(header, dict)  # it begins with the magic, so it is an object
    found = header.pop("__metadata__")
    if not isinstance(found, dict):
        raise DamagedFile("the header's metadata is not an object; save the cache again")
    metadata: dict[str, str] = {}
    for key, value in found.items():
        if not isinstance(value, str):
            raise DamagedFile(f"the header's {key[:60]!r} entry is not text; save the cache again")
        metadata[key] = value
    checksums = parse_json(metadata.get("checksums", "null").encode(), "the checksum table")
    if not isinstance(checksums, dict) or checksums.keys() != header.keys():
        raise DamagedFile("tensors and checksums do not match up; save the cache again")
    entries = [_entry(name, fields, checksums[name]) for name, fields in header.items()]
    at = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != at:
            raise DamagedFile(
                f"tensor {entry.name!r} begins at byte {entry.begin} of the data, {at} was "
                "expected: tensors overlap or leave a hole; save the cache again"
            )
        at = entry.end
    if at != data_bytes:
        raise DamagedFile(
            f"the tensors take {at} bytes, the file has {data_bytes} for them; save the cache again"
        )
    return metadata, {entry.name: entry for entry in entries}


def _entry(name: str, fields: Json, digest: Json) -> TensorEntry:
    def bad(what: str, came: Json) -> NoReturn:
        raise DamagedFile(
            f"tensor {name[:60]!r} has {what} {str(came)[:80]}, which no cache has; save the "
            "cache again"
        )

    if not _NAME.fullmatch(name):
        bad("the name", name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        bad("the fields", fields)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        bad("dtype", dtype)
    if not isinstance(digest, str) or not _CHECKSUM.fullmatch(digest):
        bad("checksum", digest)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        bad("shape", shape)
    if not isinstance(offsets, list) or len(offsets) != 2:
        bad("offsets", offsets)
    sizes = [n for n in shape if type(n) is int and 0 <= n < 1 << 48]  # bool is no length
    ends = [n for n in offsets if type(n) is int and 0 <= n < 1 << 60]
    if len(sizes) != len(shape):
        bad("shape", shape)
    if len(ends) != 2 or ends[0] > ends[1] or ends[0] % ITEM_BYTES[dtype]:
        bad("offsets", offsets)
    if math.prod(sizes) * ITEM_BYTES[dtype] != ends[1] - ends[0]:
        bad(f"shape {str(shape)[:60]} of {dtype}, but bytes", ends[1] - ends[0])
    return TensorEntry(
        name=name, dtype=dtype, shape=tuple(sizes), begin=ends[0], end=ends[1], checksum=digest
    )
