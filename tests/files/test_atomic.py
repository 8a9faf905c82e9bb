"""A file is written whole or not at all."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mnemon.errors import FileError
from mnemon.files import atomic
from mnemon.files.atomic import SUFFIX, Writer, write_atomically

OLD, NEW = b"old content", b"new content, and longer" * 1000


def produce(writer: Writer) -> None:
    writer.write(b"?" * 4)
    for begin in range(4, len(NEW), 5000):
        writer.write(memoryview(NEW)[begin : begin + 5000])
    writer.write_at(NEW[:4], 0)


def strays(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(SUFFIX)]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.cache"
    path.write_bytes(OLD)
    return path


def test_writes_and_replaces(tmp_path: Path, target: Path) -> None:
    write_atomically(tmp_path / "fresh", produce)
    write_atomically(str(target), produce)
    assert (tmp_path / "fresh").read_bytes() == target.read_bytes() == NEW
    assert sorted(os.listdir(tmp_path)) == ["fresh", "prompt.cache"]


def test_relative_path_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_atomically("relative", produce)
    write_atomically(Path("~/home"), produce)
    assert (tmp_path / "relative").read_bytes() == (tmp_path / "home").read_bytes() == NEW


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "b")
    write_atomically(path, produce)
    assert path.read_bytes() == NEW


def test_link_stays_a_link(tmp_path: Path, target: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link"
    link.symlink_to(target)
    write_atomically(link, produce)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert os.listdir(elsewhere) == ["link"]


def test_dangling_link_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    write_atomically(link, produce)
    assert link.is_symlink()
    assert (tmp_path / "real").read_bytes() == NEW


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_mode_of_an_existing_file_is_kept(target: Path, mode: int) -> None:
    target.chmod(mode)
    write_atomically(target, produce)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_of_a_new_file_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "fresh", produce)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == mode


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a directory"):
        write_atomically(tmp_path, produce)
    with pytest.raises(FileError, match="does not exist; create it"):
        write_atomically(tmp_path / "missing" / "file", produce)
    with pytest.raises(FileError, match="not a regular file"):
        write_atomically("/dev/null", produce)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(FileError):
        write_atomically(loop, produce)
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_protected(tmp_path: Path, target: Path) -> None:
    target.chmod(0o400)
    with pytest.raises(FileError, match="write-protected"):
        write_atomically(target, produce)
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="could not be written"):
        write_atomically(tmp_path / "fresh", produce)
    tmp_path.chmod(0o700)
    assert target.read_bytes() == OLD


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_write_protected_for_somebody_else(tmp_path: Path, target: Path) -> None:
    target.chmod(0o644)
    # pytest's folders are closed to others, and a worker of xdist has one more of them.
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() != "root" or parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    code = (
        "import os, sys\n"
        "from mnemon.files.atomic import write_atomically\n"
        "from mnemon.errors import FileError\n"
        "os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: write_atomically(path, lambda w: w.write(b'x'))\n"
        "    except FileError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(target), str(tmp_path / "fresh")],
        capture_output=True,
        text=True,
        check=True,
    )
    protected, denied = result.stdout.splitlines()
    assert "write-protected" in protected
    assert "Permission denied" in denied
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == [target.name]


@pytest.fixture
def small_disk(target: Path) -> Iterator[None]:
    """No file may grow beyond 8000 bytes: write(2) fails half way, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_full_disk_leaves_the_old_file(target: Path) -> None:
    with pytest.raises(FileError, match="the old file is intact") as caught:
        write_atomically(target, produce)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("call", ["write", "pwrite", "fsync", "replace"])
def test_any_failing_call_leaves_the_old_file(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, call, fail)
        with pytest.raises(FileError, match="No space left on device"):
            write_atomically(target, produce)
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == [target.name]


# A file that was just opened is closed when the exception lets go of its frame.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_interrupt_at_every_line(target: Path) -> None:
    """KeyboardInterrupt at the n-th executed line of the writer, for every n there is."""
    interrupted = 0
    while True:
        target.write_bytes(OLD)
        left = interrupted

        def trace(frame, event, argument):  # type: ignore[no-untyped-def]
            nonlocal left
            if frame.f_code.co_filename not in (atomic.__file__, __file__):
                return None
            if event == "line":
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                left -= 1
            return trace

        sys.settrace(trace)
        try:
            write_atomically(target, produce)
            sys.settrace(None)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert target.read_bytes() in (OLD, NEW)
        assert os.listdir(target.parent) == [target.name]
    assert interrupted > 40
    assert target.read_bytes() == NEW


_SLOW_SAVE = """
import sys, time
from mnemon.files.atomic import write_atomically
def produce(writer):
    for _ in range(1000):
        writer.write(b"new" * 1000)
        print("writing", flush=True)
        time.sleep(0.01)
write_atomically(sys.argv[1], produce)
"""


def _start_slow_save(target: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_SAVE, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a shell ignores Ctrl-C, and its children with it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "writing\n"
    return process


def test_ctrl_c_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    process = _start_slow_save(target)
    assert len(strays(target.parent)) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == [target.name]


def test_killed_save_is_swept_by_the_next_one(target: Path) -> None:
    process = _start_slow_save(target)
    process.kill()
    process.communicate(timeout=30)
    assert target.read_bytes() == OLD
    assert len(strays(target.parent)) == 1
    other = target.with_name("other.cache")
    write_atomically(other, produce)  # another target's stray is none of its business
    assert len(strays(target.parent)) == 1
    write_atomically(target, produce)
    assert target.read_bytes() == NEW
    assert strays(target.parent) == []


def test_a_save_in_progress_is_not_swept(target: Path) -> None:
    process = _start_slow_save(target)
    write_atomically(target, produce)
    assert len(strays(target.parent)) == 1
    time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert target.read_bytes() == NEW
    assert strays(target.parent) == []
