"""What is no whole and honest cache file is refused for the right reason, and cheaply."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemon.errors import (
    DamagedFile,
    FileError,
    NewerVersion,
    NotACacheFile,
    TruncatedFile,
    UnsafeFile,
)
from mnemon.files import header
from mnemon.files.header import build_header, lay_out, open_for_reading, read_header
from mnemon.files.tensors import TensorFile, write_tensors

META = {"recipe": "dense"}


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    path = tmp_path / "good"
    write_tensors(path, {"layers.0.keys": torch.randn(1, 2, 5, 4), "tokens": torch.arange(5)}, META)
    return path.read_bytes()


def read_all(path: Path) -> None:
    file = TensorFile(path)
    file.check(*file.header.tensors)


def refusal(path: Path) -> FileError:
    with pytest.raises(FileError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    return caught.value


def refusal_of(data: bytes, tmp_path: Path) -> FileError:
    path = tmp_path / "bad"
    path.write_bytes(data)
    return refusal(path)


def test_truncated_at_every_byte(tmp_path: Path, whole: bytes) -> None:
    for size in range(1, len(whole)):
        assert type(refusal_of(whole[:size], tmp_path)) is TruncatedFile, size
    error = refusal_of(whole[:-1], tmp_path)
    assert f"ends after {len(whole) - 1} bytes, {len(whole)} were written" in str(error)


def test_empty_missing_directory(tmp_path: Path) -> None:
    error = refusal_of(b"", tmp_path)
    assert type(error) is NotACacheFile
    assert "empty" in str(error)
    error = refusal(tmp_path / "missing")
    assert type(error) is NotACacheFile
    assert "no such file" in str(error)
    error = refusal(tmp_path / "bad" / "below-a-file")
    assert "no such file" in str(error)
    error = refusal(tmp_path)
    assert type(error) is NotACacheFile
    assert "directory" in str(error)


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert type(refusal(tmp_path / "pipe")) is NotACacheFile


@pytest.mark.parametrize(
    "data",
    [
        b"hello world, this is text\n" * 20,
        b"y",
        b"\n",
        "dies ist kein Cache: äöü".encode(),
        b'{"a": 1}' * 30,
        b"GGUF\x03\0\0\0" + bytes(200),
        b"\x89HDF\r\n\x1a\n" + bytes(200),
        bytes(4096),
        b"\xff" * 4096,
        random.Random(0).randbytes(4096),
    ],
)
def test_something_else(tmp_path: Path, data: bytes) -> None:
    assert type(refusal_of(data, tmp_path)) is NotACacheFile


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_model_weights(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"model.embed_tokens.weight": torch.randn(9, 4)}, path, metadata)
    error = refusal(path)
    assert type(error) is NotACacheFile
    assert "model.embed_tokens.weight" in str(error)
    assert "a model's weights" in str(error)


def test_model_weights_with_a_header_that_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    body = b'{"weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(0x0280)
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert type(refusal(path)) is NotACacheFile


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_not_opened(tmp_path: Path, protocol: int) -> None:
    error = refusal_of(pickle.dumps(Bomb(), protocol), tmp_path)
    assert type(error) is UnsafeFile
    assert "run any code" in str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save_is_not_opened(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "cache.pt"
    torch.save({"x": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    assert type(refusal(path)) is UnsafeFile


def test_other_archives_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "cache.npz", keys=np.zeros(3))
    assert type(refusal(tmp_path / "cache.npz")) is UnsafeFile
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert type(refusal(tmp_path / "empty.zip")) is UnsafeFile


def test_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "newer"
    with monkeypatch.context() as patch:
        patch.setattr(header, "FORMAT_VERSION", 7)
        write_tensors(path, {"x": torch.zeros(3)}, META)
    error = refusal(path)
    assert type(error) is NewerVersion
    assert "format version 7, this mnemon reads up to 1; upgrade" in str(error)


def test_newer_version_with_another_digest(tmp_path: Path, whole: bytes) -> None:
    """A later version may hash its header otherwise; it is still told from a damaged digit."""
    later = whole.replace(b'"format_version":"00001"', b'"format_version":"00002"')
    assert type(refusal_of(later, tmp_path)) is DamagedFile
    assert type(refusal_of(later.replace(b"dense", b"later"), tmp_path)) is NewerVersion


def test_rewritten_by_another_program(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "copied"
    with safetensors.safe_open(tmp_path / "good", "pt") as file:
        metadata = file.metadata()
    loaded = safetensors.torch.load_file(tmp_path / "good")
    changed = dict(reversed(metadata.items()))
    safetensors.torch.save_file(loaded, path, changed)
    if path.read_bytes() != whole:
        assert type(refusal(path)) is DamagedFile
    for _ in range(50):  # the order of safetensors' metadata is another one each time
        safetensors.torch.save_file(loaded, path, {**changed, "format_version": "99"})
        assert type(refusal(path)) is NewerVersion


def test_rewritten_in_our_order(tmp_path: Path, whole: bytes) -> None:
    """Our entries in our order, the version without its zeros."""
    length = int.from_bytes(whole[:8], "little")
    fields = json.loads(whole[8 : 8 + length])
    fields["__metadata__"]["format_version"] = "99"
    body = json.dumps(fields, separators=(",", ":")).encode().ljust(length)
    assert type(refusal_of(whole[:8] + body + whole[8 + length :], tmp_path)) is NewerVersion


# -- forged: everything is consistent but for one lie, digest included ---------------------------


def forge(change: Callable[[dict[str, Any]], None], data: bytes = bytes(64)) -> bytes:
    """A file of one tensor whose header was changed and then signed like an honest one."""
    entries = lay_out([("x", "F32", (2, 8))])
    checksum = xxhash.xxh3_128_hexdigest(bytes(64))
    built = build_header({**META}, entries)
    fields = json.loads(built[8:])
    fields["__metadata__"]["checksums"] = json.dumps({"x": checksum})
    change(fields)
    return sign(json.dumps(fields, separators=(",", ":")).encode(), data)


def sign(body: bytes, data: bytes) -> bytes:
    size = len(body) + -(8 + len(body)) % 64
    body = body.ljust(size)
    preamble = header._preamble(header.FORMAT_VERSION, size, 8 + size + len(data))
    body = preamble + body[len(preamble) :]
    length = size.to_bytes(8, "little")
    digest = xxhash.xxh3_128_hexdigest(length + body).encode()
    at = header._DIGEST_AT
    return length + body[:at] + digest + body[at + 32 :] + data


def set_x(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["x"].update(fields)


def rename(name: str) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields[name] = fields.pop("x")
        checksums = json.loads(fields["__metadata__"]["checksums"])
        fields["__metadata__"]["checksums"] = json.dumps({name: checksums["x"]})

    return change


def test_an_unchanged_forgery_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "fine").write_bytes(forge(lambda _: None))
    file = TensorFile(tmp_path / "fine")
    file.check("x")
    assert torch.equal(file.tensor("x"), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_x(dtype="F33"), "dtype F33"),
        (set_x(dtype=7), "dtype 7"),
        (set_x(dtype=["F32"]), "dtype"),
        (set_x(dtype="F64"), "shape"),
        (set_x(shape=[2, 9]), "shape"),
        (set_x(shape=[-2, -8]), "shape"),
        (set_x(shape=[True, 16]), "shape"),
        (set_x(shape=[2.0, 8]), "shape"),
        (set_x(shape="28"), "shape"),
        (set_x(shape=[1 << 62, 1 << 62]), "shape"),
        (set_x(shape=[0, 1 << 62], data_offsets=[0, 0]), "shape"),
        (set_x(shape=[1] * 5000 + [16]), "shape"),
        (set_x(shape=None), "shape"),
        (set_x(data_offsets=[0, 1 << 62]), "offsets"),
        (set_x(data_offsets=[-64, 0]), "offsets"),
        (set_x(data_offsets=[64, 0]), "offsets"),
        (set_x(data_offsets=[0, "64"]), "offsets"),
        (set_x(data_offsets=[0]), "offsets"),
        (set_x(data_offsets=[1, 65]), "offsets"),
        (set_x(data_offsets=[64, 128]), "leave a hole"),
        (set_x(shape=[15], data_offsets=[0, 60]), "tensors take 60 bytes"),
        (set_x(more=1), "fields"),
        (lambda h: h["x"].pop("shape"), "fields"),
        (lambda h: h.update(x=[]), "fields"),
        (lambda h: h.pop("x"), "do not match up"),
        (lambda h: h.update(y=h["x"]), "do not match up"),
        (lambda h: h["__metadata__"].update(checksums="{}"), "do not match up"),
        (lambda h: h["__metadata__"].update(checksums='{"x":7}'), "checksum 7"),
        (lambda h: h["__metadata__"].update(checksums="[" * 100_000), "not valid JSON"),
        (lambda h: h["__metadata__"].update(checksums="{"), "not valid JSON"),
        (lambda h: h["__metadata__"].pop("checksums"), "do not match up"),
        (lambda h: h["__metadata__"].update(recipe=7), "not text"),
        (rename("../../etc/passwd"), "name"),
        (rename("x" * 300), "name"),
        (rename(""), "name"),
        (rename("a\nb"), "name"),
    ],
)
def test_forged_tables(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    error = refusal_of(forge(change), tmp_path)
    assert type(error) is DamagedFile
    assert message in str(error)


def test_forged_overlap(tmp_path: Path) -> None:
    def overlap(fields: dict[str, Any]) -> None:
        fields["y"] = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
        digest = json.loads(fields["__metadata__"]["checksums"])["x"]
        fields["__metadata__"]["checksums"] = json.dumps({"x": digest, "y": digest})

    assert "overlap" in str(refusal_of(forge(overlap), tmp_path))


@pytest.mark.parametrize(
    "tail",
    [
        b',"x":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]}}',
        b',"y":NaN}',
        b',"y":Infinity}',
        b',"y":-1e999}',
        b',"y":' + b"9" * 5000 + b"}",
        b',"y":' + b"[" * 100_000 + b"}",
        b',"y":' + b'{"a":' * 50_000 + b"}",
        b',"y":"\xff\xfe"}',
        b',"y":"\\ud800"}',
        b"",
        b"} trailing",
        b',"__metadata__":{}}',
    ],
)
def test_forged_json(tmp_path: Path, tail: bytes) -> None:
    honest = forge(lambda _: None)
    size = int.from_bytes(honest[:8], "little")
    body = honest[8 : 8 + size].rstrip().removesuffix(b"}") + tail
    assert type(refusal_of(sign(body, bytes(64)), tmp_path)) is DamagedFile


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_header_lengths_are_not_believed(tmp_path: Path, whole: bytes, length: int) -> None:
    """A length that disagrees, alone or on both places, is refused without allocating it."""
    field = length.to_bytes(8, "little")
    assert type(refusal_of(field + whole[8:], tmp_path)) is DamagedFile
    digits = b'"header_bytes":"%010d"' % min(length, 10**10 - 1)
    at = whole.index(b'"header_bytes"')
    both = min(length, 10**10 - 1).to_bytes(8, "little") + whole[8:at] + digits
    both += whole[at + len(digits) :]
    assert type(refusal_of(both, tmp_path)) in (DamagedFile, TruncatedFile)
    foreign = field + b'{"x":1}'.ljust(500)
    assert type(refusal_of(foreign, tmp_path)) in (NotACacheFile, DamagedFile)


def test_a_bomb_of_json_is_bounded(tmp_path: Path) -> None:
    """The costliest header that is read at all, in a process of its own with little memory."""
    path = tmp_path / "bomb"
    body = forge(lambda _: None)[8:].split(b"}}")[0]
    bomb = b',"y":[' + b"[]," * ((header.MAX_HEADER_BYTES - 2048) // 3) + b"[]]}"
    honest = forge(lambda _: None)
    size = int.from_bytes(honest[:8], "little")
    body = honest[8 : 8 + size].rstrip().removesuffix(b"}") + bomb
    path.write_bytes(sign(body, bytes(64)))
    code = (
        "import resource, sys\n"
        "from mnemon.files import read_summary\n"
        "from mnemon.errors import DamagedFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_summary(sys.argv[1])\n"
        "except DamagedFile: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 200 << 10


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FileError):
        read_header(io.BytesIO(data), len(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.integers(0, 600), st.data())
def test_arbitrary_splices_are_refused(splice: bytes, at: int, data: st.DataObject) -> None:
    honest = forge(lambda _: None)
    cut = data.draw(st.integers(min(at, len(honest)), len(honest)))
    spliced = honest[:at] + splice + honest[cut:]
    if len(spliced) != len(honest) or spliced[:-64] != honest[:-64]:
        with pytest.raises(FileError):
            read_header(io.BytesIO(spliced), len(spliced))


def test_reading_a_header_reads_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"keys": torch.zeros(1 << 20)}, META)
    with open_for_reading(path) as (file, found):
        assert found.data_begin % 64 == 0
        assert file.tell() == found.data_begin
        assert found.tensors["keys"].shape == (1 << 20,)
