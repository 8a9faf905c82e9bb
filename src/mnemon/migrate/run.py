"""Migrate many files: read, filter, decide on several processes, write each whole or not at all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from mnemon.migrate.engine import is_candidate, migrate_source
from mnemon.migrate.model import FileResult, Problem
from mnemon.migrate.notebook import migrate_notebook
from mnemon.migrate.paths import STDIN
from mnemon.migrate.target import Target

__all__ = ["migrate_bytes", "migrate_files", "write"]

# Below this many bytes of candidates starting processes takes longer than they save.
_WORTH_PROCESSES = 600_000
_CHUNK = 8
_BATCH_BYTES = 48_000_000


def migrate_bytes(content: bytes, target: Target, path: str) -> FileResult:
    """Migrate a file's bytes as what its name says it is."""
    if path.endswith(".ipynb"):
        return migrate_notebook(content, target, path)
    return migrate_source(content, target, path)


def migrate_files(
    paths: list[str], target: Target, *, num_processes: int | None = None
) -> Iterator[FileResult]:
    """Results of `paths`, in their order.

    Args:
        paths: files; ``-`` is standard input.
        target: the release that the code should run under.
        num_processes: at most so many; None takes one for each core that may be used.
    """
    cores = num_processes or len(os.sched_getaffinity(0) if _has_affinity() else [0])
    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        for batch in _batches(paths):
            candidates = [read for read in batch if is_candidate(read.before)]
            size = sum(len(read.before) for read in candidates)
            if pool is None and cores > 1 and len(candidates) > 1 and size > _WORTH_PROCESSES:
                # Fresh processes: a fork of a program that has threads may hang.
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(cores, mp_context=context)
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            if pool is None:
                yield from (_migrated(read, target) for read in batch)
            else:
                yield from _spread(pool, batch, candidates, target)


def _batches(paths: list[str]) -> Iterator[list[FileResult]]:
    """Files as they are read, so many at a time that they fit in memory."""
    batch: list[FileResult] = []
    size = 0
    for path in paths:
        batch.append(_read(path))
        size += len(batch[-1].before)
        if size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _migrated(read: FileResult, target: Target) -> FileResult:
    return read if read.problems else migrate_bytes(read.before, target, read.path)


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")


def _spread(
    pool: ProcessPoolExecutor,
    batch: list[FileResult],
    candidates: list[FileResult],
    target: Target,
) -> Iterator[FileResult]:
    tasks = [(read.before, target, read.path) for read in candidates]
    done = pool.map(_work, tasks, chunksize=_CHUNK)
    are_candidates = {id(read) for read in candidates}
    for read in batch:
        yield next(done) if id(read) in are_candidates else _migrated(read, target)


def _work(task: tuple[bytes, Target, str]) -> FileResult:
    return migrate_bytes(*task)


def _read(path: str) -> FileResult:
    result = FileResult(path=path)
    try:
        if path == STDIN:
            result.before = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                result.before = file.read()
    except OSError as error:
        result.problems.append(Problem(message=f"cannot be read: {error.strerror or error}"))
    result.after = result.before
    return result


def write(result: FileResult) -> None:
    """Put the new bytes where the old ones are, whole or not at all; mode and links stay.

    Raises:
        OSError: the folder cannot be written, or the file changed meanwhile.
    """
    path = os.path.realpath(result.path)
    with open(path, "rb") as file:
        if file.read() != result.before:
            raise OSError(f"{result.path} was changed by someone else meanwhile; run again")
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".migrate-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(result.after)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, os.stat(path).st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
