"""Tensors come back from a file bit for bit, or not at all."""

import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from mnemon.errors import DamagedFile, FileError
from mnemon.files import header, tensors
from mnemon.files.tensors import TensorFile, write_tensors

META = {"recipe": "dense", "note": 'quotes " and ünïcode'}


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().cpu().contiguous().view(-1)
    return bytes(plain.view(torch.uint8).numpy())


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = TensorFile(path)
    file.check(*file.header.tensors)
    return {name: file.tensor(name) for name in file.header.tensors}


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@pytest.fixture(params=[False, True], ids=["read", "mapped"])
def any_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(tensors, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("any_way")
def test_every_dtype_and_layout_round_trips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = {f"plain.{i}": random_tensor(d, 3, 5) for i, d in enumerate(tensors._NAMES)}
    grown = torch.randn(2, 4, 16, 8, dtype=torch.bfloat16)
    saved |= {
        "view": grown[:, :, 3:9],
        "transposed": grown.transpose(1, 3),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(2, 0, 8),
        "leaf": torch.randn(3, requires_grad=True),
    }
    write_tensors(tmp_path / "file", saved, META)
    loaded = read_all(tmp_path / "file")
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name
        assert loaded[name].data_ptr() % tensor.dtype.itemsize == 0, name


def test_is_plain_safetensors(tmp_path: Path) -> None:
    saved = {"layers.0.keys": torch.randn(2, 3, dtype=torch.bfloat16), "tokens": torch.arange(6)}
    write_tensors(tmp_path / "file", saved, META)
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    assert metadata.items() >= META.items()
    assert metadata["format"] == "mnemon-cache"
    assert int(metadata["format_version"]) == header.FORMAT_VERSION
    loaded = safetensors.torch.load_file(tmp_path / "file")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_large_strided_tensors_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces far smaller than the tensor, cut at every depth, still in the right order."""
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 64)
    monkeypatch.setattr(tensors, "_RUN_BYTES", 32)
    source = torch.arange(4 * 5 * 6 * 7, dtype=torch.int32).view(4, 5, 6, 7)
    saved = {"whole": source, "cut": source[:, 1:4, ::2, 1:], "turned": source.permute(3, 1, 0, 2)}
    for tensor in saved.values():
        pieces = list(tensors._pieces(tensor))
        assert max(p.numel() * 4 for p in pieces) <= 64
        assert torch.equal(torch.cat([p.reshape(-1) for p in pieces]), tensor.reshape(-1))
    write_tensors(tmp_path / "file", saved, META)
    loaded = read_all(tmp_path / "file")
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_saving_needs_no_copy_of_the_whole(tmp_path: Path) -> None:
    """The peak of resident memory rises by pieces, not by the 256 MiB that are written."""
    buffer = torch.zeros(1, 8, 70000, 64, dtype=torch.float32)
    view = buffer[:, :, : 1 << 17 >> 1]  # strided: contiguous() of it would be 128 MiB
    write_tensors(tmp_path / "warm", {"a": torch.zeros(4)}, META)
    before = _resident_bytes()
    with open("/proc/self/clear_refs", "w") as reset_peak:
        reset_peak.write("5")
    write_tensors(tmp_path / "file", {"keys": view, "values": view}, META)
    assert (tmp_path / "file").stat().st_size > 256 << 20
    assert _peak_bytes() - before < 48 << 20


def _peak_bytes() -> int:
    with open("/proc/self/status") as status:
        found = next(line for line in status if line.startswith("VmHWM"))
    return int(found.split()[1]) << 10


def test_writing_to_a_loaded_tensor_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    path = tmp_path / "file"
    write_tensors(path, {"keys": torch.zeros(1000)}, META)
    before = path.read_bytes()
    file = TensorFile(path)
    assert file.is_mapped
    file.tensor("keys").fill_(1.0)
    assert path.read_bytes() == before
    assert TensorFile(path).tensor("keys").sum() == 0


def test_a_loaded_file_may_be_replaced_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    path = tmp_path / "file"
    write_tensors(path, {"keys": torch.ones(100_000)}, META)
    keys = TensorFile(path).tensor("keys")
    write_tensors(path, {"keys": torch.zeros(5)}, META)
    path.unlink()
    assert keys.sum() == 100_000


def test_mapping_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped tensor's pages come from the file when they are touched, not before."""
    monkeypatch.setattr(tensors, "SMALL_BYTES", 0)
    path = tmp_path / "file"
    write_tensors(path, {"keys": torch.zeros(8 << 20)}, META)
    before = _resident_bytes()
    keys = TensorFile(path).tensor("keys")
    assert _resident_bytes() - before < 4 << 20
    assert keys.sum() == 0
    assert _resident_bytes() - before >= 30 << 20


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_refuses_a_dtype_that_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"complex128.*expected one of bool"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.complex128)}, META)
    assert os.listdir(tmp_path) == []


def test_refuses_a_header_that_no_reader_would_accept(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="keep bulky state in tensors"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(2)}, {"note": "x" * (5 << 20)})
    assert os.listdir(tmp_path) == []


def _small_file(path: Path) -> bytes:
    torch.manual_seed(1)
    saved = {"layers.0.keys": torch.randn(1, 2, 5, 4), "tokens": torch.arange(5)}
    write_tensors(path, saved, META)
    return path.read_bytes()


def _refused(path: Path, data: bytes) -> FileError:
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_any_flipped_bit_is_damage(tmp_path: Path) -> None:
    """Every bit of the first 300 bytes, and 400 others all over the file."""
    whole = _small_file(tmp_path / "file")
    rng = random.Random(0)
    flips = [*range(300 * 8), *(rng.randrange(len(whole) * 8) for _ in range(400))]
    for flip in flips:
        data = bytearray(whole)
        data[flip // 8] ^= 1 << flip % 8
        assert type(_refused(tmp_path / "bad", bytes(data))) is DamagedFile, flip


def test_a_changed_byte_is_damage(tmp_path: Path) -> None:
    whole = _small_file(tmp_path / "file")
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(whole)
        at = rng.randrange(len(data))
        data[at] ^= rng.randrange(1, 256)
        assert type(_refused(tmp_path / "bad", bytes(data))) is DamagedFile, at


@pytest.mark.parametrize(
    "mangle",
    [
        lambda d: d + b"\0",
        lambda d: d + d,
        lambda d: d[:100] + d[101:] + b"x",
        lambda d: d[:-64] + bytes(64)[:63] + b"x",
        lambda d: d[: len(d) // 2] + bytes(len(d) - len(d) // 2),
    ],
)
def test_other_damage(tmp_path: Path, mangle: Callable[[bytes], bytes]) -> None:
    whole = _small_file(tmp_path / "file")
    assert type(_refused(tmp_path / "bad", mangle(whole))) is DamagedFile
