"""What is in a cache file, without loading it (and without torch)."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

from mnemon.errors import DamagedFile
from mnemon.files.header import Header, check_tensor, open_for_reading
from mnemon.files.tables import Json

__all__ = ["FileSummary", "LayerSummary", "read_summary"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """All layers of one kind: how many, and how many bytes they keep."""

    kind: str
    count: int
    nbytes: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FileSummary:
    """What a cache file says about itself.

    Args:
        path: as given.
        file_bytes: length of the file.
        format_version: of the file format.
        mnemon_version: which mnemon wrote it.
        recipe: of the cache, in canonical spelling.
        model_name: where the model came from, if it said so.
        model_type: transformers' name of the architecture.
        dtype: of the model.
        has_weights_hash: whether the file knows which weights computed it.
        batch_size: rows.
        num_tokens: logical tokens per row, padding included.
        num_known_tokens: how many of all rows' tokens are recorded by id.
        layers: by kind, in order of first appearance.
        tensor_bytes: bytes of all tensors.
        is_verified: all checksums were compared and hold; None when they were not compared.
    """

    path: str
    file_bytes: int
    format_version: int
    mnemon_version: str
    recipe: str
    model_name: str
    model_type: str
    dtype: str
    has_weights_hash: bool
    batch_size: int
    num_tokens: int
    num_known_tokens: int
    layers: tuple[LayerSummary, ...]
    tensor_bytes: int
    is_verified: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def read_summary(path: str | os.PathLike[str], *, verify: bool = False) -> FileSummary:
    """Reads the header of a cache file.

    Args:
        path: a file written by `cache.save`.
        verify: also read all tensors and compare them with their checksums.

    Raises:
        FileError: by subclass, if it is no whole and undamaged cache file.
    """
    with open_for_reading(path) as (file, header):
        if verify:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                with memoryview(memory) as whole, whole[header.data_begin :] as data:
                    for entry in header.tensors.values():
                        check_tensor(entry, data)
        model = _object(header.json("model"), "model")
        cache = _object(header.json("cache"), "cache")
        tokens = header.tensors.get("tokens")
        shape = tokens.shape if tokens is not None and len(tokens.shape) == 2 else (0, 0)
        known = cache.get("num_known_tokens")
        return FileSummary(
            path=os.fspath(path),
            file_bytes=header.file_bytes,
            format_version=header.version,
            mnemon_version=header.metadata.get("mnemon_version", "?"),
            recipe=header.metadata.get("recipe", "?"),
            model_name=str(model.get("name", "")),
            model_type=str(model.get("model_type", "?")),
            dtype=str(model.get("dtype", "?")),
            has_weights_hash=model.get("weights") is not None,
            batch_size=shape[0],
            num_tokens=shape[1],
            num_known_tokens=known if isinstance(known, int) else 0,
            layers=tuple(_by_kind(header, cache)),
            tensor_bytes=header.file_bytes - header.data_begin,
            is_verified=True if verify else None,
        )


def _object(found: Json, what: str) -> dict[str, Json]:
    if not isinstance(found, dict):
        raise DamagedFile(f"the header's {what!r} entry is no object; save the cache again")
    return found


def _by_kind(header: Header, cache: dict[str, Json]) -> Iterator[LayerSummary]:
    counts: dict[str, list[int]] = {}
    for group in ("layers", "cross_layers"):
        layers = cache.get(group)
        for index, layer in enumerate(layers if isinstance(layers, list) else []):
            found = _object(layer, group)
            prefix = f"{group}.{index}."
            nbytes = sum(e.nbytes for n, e in header.tensors.items() if n.startswith(prefix))
            total = counts.setdefault(str(found.get("kind")), [0, 0])
            total[0] += 1
            total[1] += nbytes
    for kind, (count, nbytes) in counts.items():
        yield LayerSummary(kind=kind, count=count, nbytes=nbytes)
