"""What processes leave behind, full file systems, and how much memory decoding takes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_START = """
import sys, torch
import mnemon
from transformers import LlamaConfig
torch.set_num_threads(1)
config = LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                     head_dim=64, hidden_size=512, vocab_size=64, intermediate_size=64)
def fill(cache, tokens, piece=256):
    new = torch.randn(1, 8, piece, 64)
    for _ in range(tokens // piece):
        for layer in range(4):
            cache.update(new, new, layer)
"""


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _START + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, *arguments: str) -> str:
    process = start(code, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_kill_9_leaves_nothing(tmp_path: Path) -> None:
    process = start(
        "cache = mnemon.Cache(config, f'disk(memory=16MiB, path={sys.argv[1]})')\n"
        "fill(cache, 4096)\n"
        "print(cache.nbytes_by_place()['disk'], flush=True)\n"
        "sys.stdin.read()\n"
        "import time; time.sleep(60)\n",
        str(tmp_path),
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0
    used = os.statvfs(tmp_path).f_bfree
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.iterdir()) == []
    assert os.statvfs(tmp_path).f_bfree >= used - 1024
    assert int(run(
        "cache = mnemon.Cache(config, f'disk(memory=16MiB, path={sys.argv[1]})')\n"
        "fill(cache, 2048)\n"
        "print(cache.num_tokens)\n",
        str(tmp_path),
    )) == 2048  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_neither_writes_nor_takes_anything_away(tmp_path: Path) -> None:
    out = run(
        "import os, gc, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from mnemon.errors import TierError\n"
        "cache = mnemon.Cache(config, f'disk(memory=16MiB, path={sys.argv[1]})')\n"
        "fill(cache, 4096)\n"
        "before = cache.layers[0].keys.sum().item()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        fill(cache, 4096)\n"
        "    except TierError:\n"
        "        del cache\n"
        "        gc.collect()\n"
        "        os._exit(7)\n"
        "    os._exit(1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "print(before == cache.layers[0].keys.sum().item())\n",
        str(tmp_path),
    )
    assert out.split() == ["7", "True"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, where this user may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("mounting is not permitted; RLIMIT_FSIZE stands in (test_segment_file)")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


_FULL = """
from mnemon.errors import DiskFull
cache = mnemon.Cache(config, f'disk(memory=16MiB, path={sys.argv[1]})')
try:
    fill(cache, 1 << 20)
except DiskFull as error:
    assert 'unchanged' in str(error) and 'path' in str(error), error
lengths = {layer.num_tokens for layer in cache.layers}
assert len(lengths) == 1, lengths
sums = [layer.keys.sum().item() for layer in cache.layers]
try:
    fill(cache, 4096, 4096)
except DiskFull:
    pass
else:
    raise AssertionError('not full')
assert sums == [layer.keys.sum().item() for layer in cache.layers]
cache.crop(-2000)
fill(cache, 1024)
print(lengths.pop(), cache.num_tokens)
"""


def test_a_full_disk(small_disk: Path) -> None:
    tokens, after = map(int, run(_FULL, str(small_disk)).split())
    assert tokens > 2048
    assert after == tokens - 2000 + 1024


def test_a_full_quota(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 20, 24 << 20))\n"
    tokens, after = map(int, run(limit + _FULL, str(tmp_path)).split())
    assert tokens > 2048
    assert after == tokens - 2000 + 1024


_MEMORY = """
import os, resource
from mnemon.attention import attend
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE')
cache = mnemon.Cache(config, sys.argv[1])
query, new = torch.randn(1, 8, 1, 64), torch.randn(1, 8, 1, 64)
warm = mnemon.Cache(config, sys.argv[1])
fill(warm, 3072)
for layer in range(4):
    attend(query, *warm.update(new, new, layer))
del warm
before = resident()
fill(cache, 32768)
peak = 0
for _ in range(3):
    for layer in range(4):
        out = attend(query, *cache.update(new, new, layer))
        peak = max(peak, resident())
print(cache.nbytes >> 20, (peak - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("memory", [32, 64])
def test_memory_stays_within_what_was_given(tmp_path: Path, memory: int) -> None:
    out = run(_MEMORY, f"disk(memory={memory}MiB, path={tmp_path})")
    stored, grown = map(int, re.findall(r"\d+", out))
    assert stored == 512
    assert grown <= memory * 1.25
