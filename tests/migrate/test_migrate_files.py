"""Bytes: encodings, line ends, files on disk, many at once, and an interrupted write."""

import os
from pathlib import Path

import pytest

from mnemon.errors import MigrateError
from mnemon.migrate import Target, migrate_source
from mnemon.migrate.paths import find
from mnemon.migrate.run import migrate_files, write

T = Target("5.23")
OLD = "from transformers import DynamicCache\nc = DynamicCache()\nn = c.seen_tokens  # ä\n"
NEW = OLD.replace("c.seen_tokens", "c.get_seq_length()")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", [True, False])
def test_line_ends_stay(newline: str, end: bool) -> None:
    old, new = (text if end else text.rstrip("\n") for text in (OLD, NEW))
    found = migrate_source(old.replace("\n", newline).encode(), T)
    assert found.after == new.replace("\n", newline).encode()


@pytest.mark.parametrize(
    ("head", "encoding", "bom"),
    [
        ("", "utf-8", b"\xef\xbb\xbf"),
        ("# -*- coding: latin-1 -*-\n", "latin-1", b""),
        ("#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n", "cp1252", b""),
    ],
)
def test_encodings_stay(head: str, encoding: str, bom: bytes) -> None:
    found = migrate_source(bom + (head + OLD).encode(encoding), T)
    assert found.after == bom + (head + NEW).encode(encoding)


def test_mixed_line_ends_tabs_and_form_feeds_stay() -> None:
    old = "from transformers import DynamicCache\r\nif 1:\n\tc = DynamicCache()\r\n\x0c\n"
    old += "\tn = c.seen_tokens\n"
    found = migrate_source(old.encode(), T)
    assert found.after.decode() == old.replace("c.seen_tokens", "c.get_seq_length()")


def test_a_statement_over_lines_keeps_its_line_ends() -> None:
    old = (
        "from transformers import (\r\n    DynamicCache,\r\n    HybridCache,\r\n)\r\n"
        "x = HybridCache(\r\n    a,  # one\r\n    max_cache_len=3,\r\n)\r\n"
    )
    found = migrate_source(old.encode(), T).after
    assert b"\n" not in found.replace(b"\r\n", b"")
    assert b"StaticCache(\r\n    a,  # one\r\n    max_cache_len=3,\r\n)" in found


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"print 'transformers', seen_tokens\n", 1),
        (b"# transformers\nx = (seen_tokens\n", 2),
        (b"# transformers \xff seen_tokens\n", None),
        (b"# coding: nonsense\n# transformers seen_tokens\n", None),
        (b"x = 'transformers seen_tokens'\0\n", None),
    ],
)
def test_what_is_not_python_is_said(content: bytes, line: int | None) -> None:
    found = migrate_source(content, T)
    assert found.after == content
    assert len(found.problems) == 1
    place = found.problems[0].place
    assert (place.line if place else None) == line


@pytest.mark.parametrize("content", [b"", b"\n", b"# transformers seen_tokens", b"\xef\xbb\xbf"])
def test_small_files(content: bytes) -> None:
    found = migrate_source(content, T)
    assert found.after == content
    assert not found.problems


def test_deep_nesting_is_no_crash() -> None:
    content = ("transformers = seen_tokens = " + "(" * 150 + "1" + ")" * 150 + "\n").encode()
    assert migrate_source(content, T).after == content
    content = ("import transformers\nx = " + "+".join(["seen_tokens"] * 20_000) + "\n").encode()
    assert migrate_source(content, T).after == content


def test_folders_links_and_what_is_passed_over(tmp_path: Path) -> None:
    for name in ("a.py", "b.ipynb", "c.txt", ".hidden/d.py", "node_modules/e.py", "v/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "v" / "f.py").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.py").symlink_to(tmp_path / "a.py")
    names = [os.path.basename(path) for path in find([str(tmp_path)])]
    assert names == ["a.py", "b.ipynb"]
    named = list(find([str(tmp_path / ".hidden"), str(tmp_path / "c.txt")]))
    assert [os.path.basename(path) for path in named] == ["d.py", "c.txt"]
    with pytest.raises(MigrateError, match="not there"):
        list(find([str(tmp_path / "none")]))


def test_many_files_on_several_processes_keep_their_order(tmp_path: Path) -> None:
    padding = "# " + "x" * 200_000 + "\n"
    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.py"
        path.write_text(OLD + padding if number % 2 else "x = 1\n")
        paths.append(str(path))
    results = list(migrate_files(paths, T, num_processes=2))
    assert [result.path for result in results] == paths
    assert [result.changed for result in results] == [False, True] * 3


def test_writing_keeps_mode_and_links(tmp_path: Path) -> None:
    path, link = tmp_path / "a.py", tmp_path / "link.py"
    path.write_text(OLD)
    path.chmod(0o754)
    link.symlink_to(path)
    (result,) = migrate_files([str(link)], T)
    write(result)
    assert path.read_text() == NEW
    assert path.stat().st_mode & 0o777 == 0o754
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.py", "link.py"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.py"
    path.write_text(OLD)
    (result,) = migrate_files([str(path)], T)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(result)
    assert path.read_text() == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


def test_a_file_that_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(OLD)
    (result,) = migrate_files([str(path)], T)
    path.write_text("x = 1\n")
    with pytest.raises(OSError, match="meanwhile"):
        write(result)
    assert path.read_text() == "x = 1\n"


def test_conditions_made_of_each_other_come_to_an_end() -> None:
    source = (
        "import transformers\n"
        "def f(x):\n"
        "    a = b = x is None\n"
        "    def g():\n"
        "        nonlocal a, b\n"
        "        a = b or x is None\n"
        "        b = a or x is None\n"
        "        if a: return x.seen_tokens\n"
        "    while a or b:\n"
        "        a = b or x is None\n"
        "        b = a or x is None\n"
    )
    assert not migrate_source(source.encode(), T).problems
