"""Writing a file whole or not at all (POSIX).

The bytes go to a temporary file beside the target, are forced to disk, and take the target's name
in one step. Whatever happens before that step, the old file is untouched.
"""

import contextlib
import fcntl
import io
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import xxhash

from mnemon.errors import FileError

SUFFIX = ".mnemon-partial"


class Writer:
    """A file being written; `write` and `write_at` take bytes or memoryviews."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of `data`."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._file.fileno(), left) :]

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Overwrites bytes from `offset` on."""
        left = memoryview(data)
        while left:
            count = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[count:], offset + count


def resolve(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a file, `~` expanded and links followed."""
    return Path(os.path.realpath(os.path.expanduser(os.fspath(path))))


def write_atomically(path: str | os.PathLike[str], produce: Callable[[Writer], None]) -> None:
    """Replaces or creates `path` with what `produce` writes.

    A link is followed and stays a link; an existing file's mode and owner are kept, a new one gets
    what the umask says. A temporary that a killed process left beside the target is removed.

    Args:
        path: where to write; its directory must exist.
        produce: is called once with an open `Writer`.

    Raises:
        FileError: the target cannot be written; the old file, if any, is intact.
    """
    target = resolve(path)
    old = _check_target(target)
    temporary = _temporary(target)
    try:
        _remove_strays(target)
        # An interrupt at any point passes through `finally`, which removes the temporary unless it
        # has already taken the target's name.
        with _create(temporary, old) as file:
            produce(Writer(file))
            os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_directory(target.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{target} could not be written ({error.strerror or error}); "
            f"{'the old file is intact' if old else 'nothing was left behind'}: free some space or "
            "choose another path"
        ) from error
    finally:
        # Not suppressing a failure here would hide the reason for it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_target(target: Path) -> os.stat_result | None:
    """What the target is now; refuses what a save must not replace."""
    if not target.parent.is_dir():
        raise FileError(f"the directory {target.parent} does not exist; create it first")
    try:
        old = os.stat(target, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{target} cannot be reached ({error.strerror}); check the path") from error
    if not stat.S_ISREG(old.st_mode):
        kind = "a directory" if stat.S_ISDIR(old.st_mode) else "not a regular file"
        raise FileError(f"{target} is {kind}; choose the path of a file")
    if not os.access(target, os.W_OK):
        raise FileError(f"{target} is write-protected; make it writable or choose another path")
    return old


def _prefix(target: Path) -> str:
    # Hashed, because a name of 255 bytes leaves no room for an addition.
    return f".{xxhash.xxh3_64_hexdigest(os.fsencode(target.name))}-"


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{SUFFIX}")


def _create(temporary: Path, old: os.stat_result | None) -> io.FileIO:
    """Opens the temporary, locked for as long as its writer lives."""

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600 if old else 0o666)

    while True:
        file = io.FileIO(temporary, "xb", opener=opener)
        # Another save to the same path may take the new file for a stray before it is locked; it
        # is then gone by the time the lock is ours, and made again.
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()
    if old:
        with contextlib.suppress(PermissionError):  # only root may give a file away
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
    return file


def _remove_strays(target: Path) -> None:
    """Removes what a killed save to the same target left: temporaries that nobody has locked."""
    for stray in target.parent.glob(f"{_prefix(target)}*{SUFFIX}"):
        with contextlib.suppress(OSError), stray.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            stray.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
