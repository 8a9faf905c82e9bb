"""Saves and loads a cache of 1 GiB, beside torch.save/load of the same tensors.

    python benchmarks/load_cache.py [--gib 1] [--repeats 7] [--saves 2] [--cold 1] [--directory .]

Writes benchmarks/results/load_cache.json and .md. Warm: the file is in the page cache. Cold: it was
dropped from there just before (posix_fadvise), so the disk is measured too.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import mnemon
from mnemon.files import read_summary

RESULTS = Path(__file__).parent / "results"
LAYERS, KV_HEADS, HEAD_DIM = 16, 8, 128


def make_model() -> Any:
    """Wide keys and values on a model that is otherwise tiny: only the cache matters here."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def fill(model: Any, size_bytes: int) -> mnemon.Cache:
    per_token = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    shape = (1, KV_HEADS, size_bytes // per_token, HEAD_DIM)
    cache = mnemon.Cache(model.config)
    for layer in range(LAYERS):
        keys = torch.randint(-999, 999, shape, dtype=torch.int16).view(torch.bfloat16)
        cache.update(keys, keys.roll(1), layer)
    return cache


def timed(call: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> float:
    """The median of `repeats` runs, in seconds."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times)


def drop(path: Path) -> None:
    """Takes a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def torch_save(tensors: dict[str, torch.Tensor], path: Path, sync: bool) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def touch(tensors: Any) -> None:
    """Reads one number of every page, as the first use of a mapped tensor does."""
    for tensor in tensors:
        assert tensor.is_contiguous()
        tensor.view(-1)[::2048].sum()


def touch_layers(cache: mnemon.Cache) -> None:
    for layer in cache.layers:
        touch(layer.view())


def resident_mib(name: str) -> float:
    """VmRSS: memory in use now; VmHWM: the most there was since clear_refs was written to."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))


def peak_mib_while_saving(directory: Path, gib: float) -> float:
    """How far resident memory rises above what it was, in a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import load_cache as b\n"
        "model = b.make_model(); cache = b.fill(model, int(float(sys.argv[3]) * 2**30))\n"
        "before = b.resident_mib('VmRSS'); open('/proc/self/clear_refs', 'w').write('5')\n"
        "cache.save(sys.argv[2], model=model); print(b.resident_mib('VmHWM') - before)"
    )
    arguments = [str(Path(__file__).parent), str(directory / "peak"), str(gib)]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    (directory / "peak").unlink()
    return float(result.stdout)


def measure_saving(
    model: Any, cache: mnemon.Cache, path: Path, pickled: Path, repeats: int
) -> dict[str, float]:
    views = [layer.view() for layer in cache.layers]
    tensors = {f"{i}.{n}": t.contiguous() for i, v in enumerate(views) for n, t in enumerate(v)}

    def fresh() -> None:
        path.unlink(missing_ok=True)
        pickled.unlink(missing_ok=True)

    def save() -> None:
        cache.save(path, model=model)

    found = {
        "size_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "num_tokens": cache.num_tokens,
        "torch_save_s": timed(lambda: torch_save(tensors, pickled, sync=True), repeats, fresh),
        "save_s": timed(save, repeats, fresh),
    }
    fsync, os.fsync = os.fsync, lambda _: None
    try:  # what the processor does, without the disk
        found["save_without_fsync_s"] = timed(save, repeats, fresh)
    finally:
        os.fsync = fsync
    found["torch_save_without_fsync_s"] = timed(
        lambda: torch_save(tensors, pickled, sync=False), repeats, fresh
    )
    save()
    return found


def measure_loading(
    model: Any, path: Path, pickled: Path, repeats: int, is_cold: bool
) -> dict[str, float]:
    def prepare() -> None:
        if is_cold:
            drop(path)
            drop(pickled)

    def load(verify: Any = "auto") -> mnemon.Cache:
        return mnemon.load_cache(path, model, verify=verify)

    def torch_load(mmap: bool) -> None:
        touch(torch.load(pickled, weights_only=True, mmap=mmap).values())

    calls: dict[str, Callable[[], Any]] = {
        "map": load,
        "load_and_use": lambda: touch_layers(load()),
        "load_eager": lambda: load("eager"),
        "torch_load": lambda: torch_load(False),
        "torch_load_mmap": lambda: torch_load(True),
        "summary": lambda: read_summary(path),
        "verify": lambda: read_summary(path, verify=True),
    }
    suffix = "cold_s" if is_cold else "warm_s"
    return {f"{name}_{suffix}": timed(call, repeats, prepare) for name, call in calls.items()}


def measure(directory: Path, gib: float, repeats: int, saves: int, cold: int) -> dict[str, float]:
    model = make_model()
    cache = fill(model, int(gib * (1 << 30)))
    path, pickled = directory / "cache.safetensors", directory / "cache.pt"
    found = measure_saving(model, cache, path, pickled, saves)
    del cache
    found |= measure_loading(model, path, pickled, repeats, is_cold=False)
    if cold:
        found |= measure_loading(model, path, pickled, cold, is_cold=True)
    return found


def to_markdown(found: dict[str, Any]) -> str:
    numbers, size = found["numbers"], found["numbers"]["size_bytes"]

    def row(label: str, *keys: str, speed: bool = False) -> str:
        cells = []
        for key in keys:
            seconds = numbers.get(key)
            shown = "" if seconds is None else f"{seconds * 1e3:,.1f} ms"
            cells.append(f"{shown} ({size / seconds / 1e9:.2f} GB/s)" if speed and shown else shown)
        return f"| {label} | " + " | ".join(cells) + " |"

    lines = [
        f"# Saving and loading a cache of {size / 2**30:.2f} GiB",
        "",
        f"{numbers['num_tokens']:,} tokens, {LAYERS} layers, {KV_HEADS} heads x {HEAD_DIM}, "
        f"bfloat16. {found['hardware']}. {found['versions']}. {found['date']}. "
        f"Medians; `{found['command']}`.",
        "",
        "| | mnemon | torch.save / torch.load |",
        "|---|---|---|",
        row("save, on disk (fsync)", "save_s", "torch_save_s", speed=True),
        row("save, in the page cache", "save_without_fsync_s", "torch_save_without_fsync_s",
            speed=True),
        f"| memory above the cache's own while saving | {numbers['save_peak_mib']:.0f} MiB | |",
        "",
        "| load | warm | cold |",
        "|---|---|---|",
        row("mnemon: map (`load_cache` returns)", "map_warm_s", "map_cold_s"),
        row("mnemon: map, check and read every layer", "load_and_use_warm_s", "load_and_use_cold_s",
            speed=True),
        row("mnemon: `verify=\"eager\"`", "load_eager_warm_s", "load_eager_cold_s", speed=True),
        row("torch.load and read (checks nothing)", "torch_load_warm_s", "torch_load_cold_s",
            speed=True),
        row("torch.load(mmap=True) and read (checks nothing)", "torch_load_mmap_warm_s",
            "torch_load_mmap_cold_s", speed=True),
        row("`read_summary`", "summary_warm_s", "summary_cold_s"),
        row("`read_summary(verify=True)`", "verify_warm_s", "verify_cold_s", speed=True),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        model = named[0].split(":")[1].strip() if named else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPUs ({model}), {memory:.0f} GiB memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--saves", type=int, default=2, help="repeats of each way of saving")
    parser.add_argument("--cold", type=int, default=1, help="repeats with a cold page cache")
    parser.add_argument("--directory", type=Path, default=None, help="where to put the files")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        peak = peak_mib_while_saving(directory, arguments.gib)
        numbers = measure(
            directory, arguments.gib, arguments.repeats, arguments.saves, arguments.cold
        )
    finally:
        shutil.rmtree(directory)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/load_cache.py --gib {arguments.gib:g}",
        "hardware": hardware(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "numbers": numbers | {"save_peak_mib": peak},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "load_cache.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "load_cache.md").write_text(to_markdown(found))
    print(to_markdown(found))


if __name__ == "__main__":
    main()
