"""Tensors to bytes and back: streamed out piece by piece, mapped in without a copy."""

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, final

import torch
import xxhash

from mnemon.errors import FileError
from mnemon.files.atomic import Writer, write_atomically
from mnemon.files.header import (
    Header,
    TensorEntry,
    build_header,
    check_tensor,
    lay_out,
    naming,
    open_for_reading,
)

__all__ = ["TensorFile", "write_tensors"]

#: Files up to this size are read into memory and checked whole; larger ones are mapped.
SMALL_BYTES: Final = 64 << 20
_PIECE_BYTES = 16 << 20  # at most this much is copied at a time
_RUN_BYTES = 64 << 10  # and runs of at least this much are not copied at all

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a cache file in one pass, at no more than two pieces of 16 MiB of scratch memory.

    Tensors may be strided and on any device. The header goes first with empty checksums and is
    written again once the tensors have been hashed on their way out.

    Raises:
        FileError: the file cannot be written, or a dtype cannot be stored; the old file is intact.
    """
    table = []
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise FileError(
                f"tensor {name!r} is {tensor.dtype}, which a cache file cannot hold; expected one "
                f"of {', '.join(str(d).removeprefix('torch.') for d in _NAMES)}"
            )
        table.append((name, _NAMES[tensor.dtype], tuple(tensor.shape)))
    entries = lay_out(table)

    def produce(writer: Writer) -> None:
        writer.write(build_header(metadata, entries))
        hashed: list[TensorEntry] = []
        for entry in entries:
            checksum = xxhash.xxh3_128()
            for piece in _pieces(_plain(tensors[entry.name])):
                # The buffer protocol knows neither bfloat16 nor float8, so all go as bytes.
                array: Any = piece.view(-1).view(torch.uint8).numpy()
                data = memoryview(array)
                checksum.update(data)
                writer.write(data)
            hashed.append(replace(entry, checksum=checksum.hexdigest()))
        writer.write_at(build_header(metadata, hashed), 0)

    write_atomically(path, produce)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # A view with a pending conjugation or sign has other bytes than numbers.
    return tensor.detach().resolve_conj().resolve_neg()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in row-major order, as contiguous pieces in main memory.

    Runs that lie together in memory are not copied: a buffer with reserve keeps each head's tokens
    together, and writing them from where they are is twice as fast.
    """
    size_bytes = tensor.numel() * tensor.element_size()
    if size_bytes == 0:
        return
    if tensor.is_contiguous():
        for part in torch.split(tensor.view(-1), _PIECE_BYTES // tensor.element_size()):
            yield part.to("cpu")
        return
    row_bytes = size_bytes // tensor.shape[0]
    if size_bytes <= _PIECE_BYTES and row_bytes < _RUN_BYTES:
        yield tensor.to("cpu").contiguous()
        return
    rows = 1 if row_bytes >= _RUN_BYTES else _PIECE_BYTES // row_bytes
    for part in torch.split(tensor, rows):
        yield from _pieces(part[0] if rows == 1 else part)


@final
class TensorFile:
    """An open cache file: its header, and its tensors, checked before they are handed out.

    Tensors borrow the file's memory. The mapping is private: writing to a tensor changes neither
    the file nor what others read. As with any mapped file, somebody who overwrites the file in
    place changes what has not been read yet; `save` never does that, it replaces the file.

    Raises:
        FileError: by subclass, whatever is wrong with the header or the file's length.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.expanduser(os.fspath(path))
        with open_for_reading(path) as (file, header):
            self.header: Header = header
            self.is_mapped = header.file_bytes > SMALL_BYTES
            if self.is_mapped:
                self._memory = mmap.mmap(file.fileno(), header.file_bytes, access=mmap.ACCESS_COPY)
                self._data_begin = header.data_begin
            else:
                # Anonymous memory is aligned, and no longer depends on the file.
                size = header.file_bytes - header.data_begin
                self._memory = mmap.mmap(-1, max(size, 1))
                self._data_begin = 0
                self._memory[:size] = file.read(size).ljust(size, b"\0")
        self._checked: set[str] = set()

    def check(self, *names: str) -> None:
        """Compares tensors with their checksums, each once.

        Raises:
            DamagedFile: the bytes are not those that were written.
        """
        data = memoryview(self._memory)[self._data_begin :]
        for name in names:
            if name not in self._checked:
                with naming(self.path):
                    check_tensor(self.header.tensors[name], data)
                self._checked.add(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor over the file's memory. Its numbers may be used after `check(name)`."""
        entry = self.header.tensors[name]
        dtype = _DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(
            self._memory,
            dtype=dtype,
            count=entry.nbytes // dtype.itemsize,
            offset=self._data_begin + entry.begin,
        )
        return flat.view(entry.shape)
