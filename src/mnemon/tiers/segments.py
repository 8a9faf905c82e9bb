"""The file of a disk tier: nameless, bounded, read past the page cache.

    offset 0                                             size
    [ extent ][ extent ][   free   ][ extent ]...[ free ]       all multiples of 4,096 bytes

Where the system allows it the file never has a name, or loses it as soon as it is open: whatever
ends the process, nothing stays behind. Elsewhere its name carries the process's number, and the
next start removes the files of processes that are gone.
"""

import errno
import fcntl
import mmap
import os
import re
import tempfile
import weakref
from collections import deque
from typing import Final, final

from mnemon.errors import DiskFull, TierError

__all__ = ["BLOCK_BYTES", "SegmentFile", "default_directory"]

BLOCK_BYTES: Final = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIRECT = getattr(os, "O_DIRECT", 0)
_NAMELESS = getattr(os, "O_TMPFILE", 0)
_NAME = re.compile(r"mnemon-(\d+)-[A-Za-z0-9_]+\.segments")


def default_directory() -> str:
    """Where temporary files that may be large belong: ``$TMPDIR``, or /var/tmp."""
    if os.environ.get("TMPDIR"):
        return tempfile.gettempdir()
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


@final
class SegmentFile:
    """Extents of a file: allocated, written, read, given back.

    Args:
        directory: where it lies.
        limit_bytes: size it may reach; None for what the disk holds.

    Raises:
        TierError: no file can be made there.
    """

    def __init__(self, directory: str, limit_bytes: int | None = None) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes), ascending, never touching
        self._returned: deque[tuple[int, int]] = deque()  # let go from any thread, not yet free
        self._floor = 0  # preallocated for good
        self._pid = os.getpid()
        self._fd, path = self._open()
        self._finalizer = weakref.finalize(self, _close, self._fd, path, self._pid)
        self._is_direct = bool(_DIRECT) and bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & _DIRECT)

    def _open(self) -> tuple[int, str | None]:
        try:
            _remove_stale(self.directory)
            flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            if _NAMELESS:
                for extra in (_DIRECT, 0):
                    try:
                        mode = flags | _NAMELESS | os.O_EXCL | extra
                        return os.open(self.directory, mode, 0o600), None
                    except OSError as error:
                        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
                            raise
            fd, path = tempfile.mkstemp(
                prefix=f"mnemon-{os.getpid()}-", suffix=".segments", dir=self.directory
            )
        except OSError as error:
            raise TierError(
                f"No file for the disk tier can be made in {self.directory!r} ({error.strerror}): "
                f"expected a directory that can be written to; name one with disk(path=...)."
            ) from error
        try:
            os.unlink(path)
        except OSError:
            return fd, path  # a system that keeps the names of open files
        if _DIRECT:
            _set_direct(fd, True)
        return fd, None

    # -- extents ---------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """Bytes of the file that hold nothing."""
        self._collect()
        return sum(size for _, size in self._free)

    @property
    def used_bytes(self) -> int:
        return self.size - self.free_bytes

    def reserve(self, num_bytes: int, *, keep: bool = False) -> None:
        """Have so many bytes free, one after the other where they have to be added.

        Args:
            num_bytes: multiple of `BLOCK_BYTES`.
            keep: never shrink below it again.

        Raises:
            DiskFull: they are not there; the file is as it was.
        """
        self._check_process()
        self._collect()
        missing = num_bytes - sum(size for _, size in self._free)
        if missing > 0:
            self._grow(missing)
        if keep:
            self._floor = max(self._floor, self.size)

    def allocate(self, count: int, num_bytes: int) -> list[int]:
        """Offsets of `count` extents of `num_bytes`; neighbours where there is room.

        Raises:
            DiskFull: no room; the file is as it was.
        """
        self._check_process()
        self._collect()
        whole = self._cut(count * num_bytes)
        if whole is not None:
            return [whole + step * num_bytes for step in range(count)]
        found: list[int] = []
        try:
            while len(found) < count:
                offset = self._cut(num_bytes)
                if offset is None:
                    ending = self._free[-1] if self._free else (self.size, 0)
                    tail = ending[1] if sum(ending) == self.size else 0
                    self._grow((count - len(found)) * num_bytes - tail)
                    continue
                found.append(offset)
        except DiskFull:
            for offset in found:
                self._insert(offset, num_bytes)
            raise
        return found

    def give_back(self, offset: int, num_bytes: int) -> None:
        """The extent is no longer needed. May be called from any thread, at any moment."""
        self._returned.append((offset, num_bytes))

    def trim(self) -> None:
        """Give what is free at the end back to the disk."""
        self._collect()
        if os.getpid() != self._pid or not self._free:
            return
        offset, size = self._free[-1]
        start = max(offset, self._floor)
        if offset + size != self.size or start >= self.size:
            return
        os.ftruncate(self._fd, start)
        self.size = start
        self._free.pop()
        if start > offset:
            self._free.append((offset, start - offset))

    def _grow(self, num_bytes: int) -> None:
        wanted = self.size + num_bytes
        if self.limit_bytes is not None and wanted > self.limit_bytes:
            raise DiskFull(
                f"The disk tier may hold {self.limit_bytes} bytes (disk(size=...)) and needs "
                f"{wanted}. The cache is unchanged: crop it, or give it more."
            )
        try:
            _preallocate(self._fd, self.size, num_bytes)
        except OSError as error:
            self._undo_growth()
            raise self._error(error, f"{num_bytes} more bytes") from error
        self._insert(self.size, num_bytes)
        self.size = wanted

    def _undo_growth(self) -> None:
        try:
            os.ftruncate(self._fd, self.size)  # a failed preallocation may have taken a part
        except OSError:
            return

    def _cut(self, num_bytes: int) -> int | None:
        """The first free extent that is large enough."""
        for place, (offset, size) in enumerate(self._free):
            if size >= num_bytes:
                if size == num_bytes:
                    del self._free[place]
                else:
                    self._free[place] = (offset + num_bytes, size - num_bytes)
                return offset
        return None

    def _collect(self) -> None:
        while self._returned:
            self._insert(*self._returned.popleft())

    def _insert(self, offset: int, size: int) -> None:
        low, high = 0, len(self._free)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._free[middle][0] < offset else (low, middle)
        if low < len(self._free) and offset + size == self._free[low][0]:
            size += self._free[low][1]
            del self._free[low]
        if low and sum(self._free[low - 1]) == offset:
            offset, size = self._free[low - 1][0], self._free[low - 1][1] + size
            low -= 1
            del self._free[low]
        self._free.insert(low, (offset, size))

    # -- bytes -----------------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, page-aligned and a multiple of `BLOCK_BYTES`, at `offset`.

        Raises:
            TierError: it cannot be written.
        """
        self._check_process()
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._fd, data[done:], offset + done)
            except OSError as error:
                if not self._leave_direct(error):
                    raise self._error(error, f"{len(data)} bytes") from error
        if not self._is_direct:
            self._forget(offset, len(data), written=True)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`; page-aligned, a multiple of `BLOCK_BYTES`.

        Raises:
            TierError: it cannot be read.
        """
        self._check_process()
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._fd, [into[done:]], offset + done)
            except OSError as error:
                if self._leave_direct(error):
                    continue
                raise self._error(error, f"{len(into)} bytes") from error
            if got == 0:
                raise TierError(
                    f"The disk tier's file in {self.directory!r} ends {len(into) - done} bytes "
                    f"early: somebody cut it. reset() the cache and prefill again."
                )
            done += got
        if not self._is_direct:
            self._forget(offset, len(into))

    def _leave_direct(self, error: OSError) -> bool:
        """Whether reading through the page cache may help (file systems that cannot do without)."""
        if error.errno != errno.EINVAL or not self._is_direct:
            return False
        self._is_direct = False
        _set_direct(self._fd, False)
        return True

    def _forget(self, offset: int, num_bytes: int, *, written: bool = False) -> None:
        """Keep the page cache from holding a second copy of everything."""
        if hasattr(os, "posix_fadvise"):
            if written:
                os.fdatasync(self._fd)  # dirty pages cannot be dropped
            os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _error(self, error: OSError, what: str) -> TierError:
        if error.errno in _FULL:
            return DiskFull(
                f"{what} do not fit on the disk of {self.directory!r} ({error.strerror}); the "
                f"cache is unchanged. Make room, crop the cache, or name another directory with "
                f"disk(path=...)."
            )
        return TierError(f"The disk tier in {self.directory!r} failed ({error.strerror}).")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TierError(
                "This cache's disk tier belongs to the process that made it; a forked child shares "
                "the file and would change it. Make a cache of its own there, or load a saved one."
            )

    def close(self) -> None:
        """Close the file; its bytes are gone."""
        self._finalizer()


def _close(fd: int, path: str | None, pid: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return
    if path is not None and os.getpid() == pid:
        try:
            os.unlink(path)
        except OSError:
            return


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
    except OSError:
        return


def _preallocate(fd: int, offset: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, offset, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        else:
            return
    os.ftruncate(fd, offset + num_bytes)


def _remove_stale(directory: str) -> None:
    """Remove the files of processes that were killed before they could take the name away."""
    with os.scandir(directory) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is not None and not _lives(int(match[1])):
                try:
                    os.unlink(entry.path)
                except OSError:
                    continue  # somebody else's, or somebody was faster


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def aligned_buffer(num_bytes: int) -> mmap.mmap:
    """Memory that begins on a page."""
    return mmap.mmap(-1, -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE)
