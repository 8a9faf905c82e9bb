"""The disk tier's file: extents, bounds, what is left behind."""

import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.errors import DiskFull, TierError
from mnemon.tiers import segments
from mnemon.tiers.segments import BLOCK_BYTES, SegmentFile, aligned_buffer


def filled(number: int, num_bytes: int = BLOCK_BYTES) -> memoryview:
    buffer = aligned_buffer(num_bytes)
    buffer.write(bytes([number % 251]) * num_bytes)
    return memoryview(buffer)


def read(file: SegmentFile, offset: int, num_bytes: int = BLOCK_BYTES) -> bytes:
    buffer = memoryview(aligned_buffer(num_bytes))
    file.read(offset, buffer)
    return bytes(buffer)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path))
    offsets = file.allocate(3, 2 * BLOCK_BYTES)
    assert offsets == [0, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES]
    for number, offset in enumerate(offsets):
        file.write(offset, filled(number + 1, 2 * BLOCK_BYTES))
    for number, offset in enumerate(offsets):
        assert read(file, offset, 2 * BLOCK_BYTES) == bytes([number + 1]) * 2 * BLOCK_BYTES
    file.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path))
    file.reserve(1 << 20)
    assert list(tmp_path.iterdir()) == []
    file.close()


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_systems_that_have_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool, direct: bool
) -> None:
    if not nameless:
        monkeypatch.setattr(segments, "_NAMELESS", 0)
    if not direct:
        monkeypatch.setattr(segments, "_DIRECT", 0)
    file = SegmentFile(str(tmp_path))
    offset = file.allocate(1, BLOCK_BYTES)[0]
    file.write(offset, filled(7))
    assert read(file, offset) == bytes([7]) * BLOCK_BYTES
    assert list(tmp_path.iterdir()) == []


def test_names_that_stay_go_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an open file keeps its name (Windows)."""
    monkeypatch.setattr(segments, "_NAMELESS", 0)

    def refuse(path: str) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        file = SegmentFile(str(tmp_path))
    (left,) = tmp_path.iterdir()
    assert str(os.getpid()) in left.name
    other = SegmentFile(str(tmp_path))  # ours is alive: the next start leaves it
    assert left.exists()
    other.close()
    file.close()
    assert not left.exists()


def test_the_next_start_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = tmp_path / f"mnemon-{gone.pid}-abc_1.segments"
    alive = tmp_path / f"mnemon-{os.getpid()}-abc.segments"
    others = tmp_path / "mnemon-notes.segments"
    for path in (stale, alive, others):
        path.write_bytes(b"x")
    SegmentFile(str(tmp_path)).close()
    assert not stale.exists()
    assert alive.exists()
    assert others.exists()


def test_a_bound_is_kept(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path), limit_bytes=4 * BLOCK_BYTES)
    offsets = file.allocate(4, BLOCK_BYTES)
    for verb in (lambda: file.allocate(1, BLOCK_BYTES), lambda: file.reserve(BLOCK_BYTES)):
        with pytest.raises(DiskFull, match="size"):
            verb()
    file.give_back(offsets[1], BLOCK_BYTES)
    assert file.allocate(1, BLOCK_BYTES) == [offsets[1]]
    assert file.size == 4 * BLOCK_BYTES


def test_a_failed_allocation_changes_nothing(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path), limit_bytes=4 * BLOCK_BYTES)
    offsets = file.allocate(4, BLOCK_BYTES)
    file.give_back(offsets[0], BLOCK_BYTES)
    file.give_back(offsets[2], BLOCK_BYTES)
    with pytest.raises(DiskFull):
        file.allocate(3, BLOCK_BYTES)
    assert file.free_bytes == 2 * BLOCK_BYTES
    assert sorted(file.allocate(2, BLOCK_BYTES)) == [offsets[0], offsets[2]]


def test_what_is_free_at_the_end_goes_back_to_the_disk(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path))
    file.reserve(2 * BLOCK_BYTES, keep=True)
    offsets = file.allocate(6, BLOCK_BYTES)
    for offset in offsets[1:]:
        file.give_back(offset, BLOCK_BYTES)
    file.trim()
    assert file.size == 2 * BLOCK_BYTES
    assert file.free_bytes == BLOCK_BYTES


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 30)), max_size=40))
def test_extents_never_overlap(steps: list[tuple[bool, int, int]]) -> None:
    file = SegmentFile(segments.default_directory())
    held: list[tuple[int, int, int]] = []
    for number, (takes, blocks, which) in enumerate(steps):
        if takes or not held:
            size = blocks * BLOCK_BYTES
            offset = file.allocate(1, size)[0]
            file.write(offset, filled(number, size))
            held.append((offset, size, number))
        else:
            offset, size, _ = held.pop(which % len(held))
            file.give_back(offset, size)
        assert file.used_bytes == sum(size for _, size, _ in held)
    for offset, size, number in held:
        assert read(file, offset, size) == bytes([number % 251]) * size
    file.close()


def test_places_where_no_file_can_be_made(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(TierError, match="path"):
            SegmentFile(str(path))


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    file = SegmentFile(str(tmp_path))
    file.reserve(BLOCK_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 where threads run
        pid = os.fork()
    if pid == 0:
        try:
            file.read(0, memoryview(aligned_buffer(BLOCK_BYTES)))
        except TierError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(read(file, 0)) == BLOCK_BYTES  # the child's end took nothing away


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """``RLIMIT_FSIZE`` in a process of its own, which it would otherwise cripple."""
    code = (
        "import resource, sys\n"
        "from mnemon.errors import DiskFull\n"
        "from mnemon.tiers.segments import SegmentFile, aligned_buffer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "file = SegmentFile(sys.argv[1])\n"
        "file.write(file.allocate(1, 1 << 19)[0], memoryview(aligned_buffer(1 << 19)))\n"
        "try:\n"
        "    file.allocate(1, 1 << 20)\n"
        "except DiskFull as error:\n"
        "    print('full', file.size, file.free_bytes)\n"
        "file.read(0, memoryview(aligned_buffer(1 << 19)))\n"
        "print(len(file.allocate(1, 1 << 19)))\n"
    )
    assert resource.RLIMIT_FSIZE
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["full", str(1 << 19), "0", "1"]


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from mnemon.tiers.segments import SegmentFile\n"
        "file = SegmentFile(sys.argv[1])\n"
        "file.reserve(1 << 20)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
