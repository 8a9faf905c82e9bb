"""What a policy costs at a decode step: append, attention and policy of one layer.

    python benchmarks/policies.py [--tokens 16384] [--heads 32] [--kv-heads 8] [--width 128]

Every recipe holds about `--tokens` tokens, its bound, so that attention reads as many bytes as
without a policy. The recipes take turns at every step, and on a CPU the processor time of all
threads is measured, so that what else the machine does falls on all of them or on none. A row is a
recipe: the median step on which nothing is dropped, the step on which a sixteenth goes, the mean
of both as often as they come, and its quotient with that of no policy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mnemon.attention.watched import Seen, WatchedTensor
from mnemon.hf.attention_functions import attention_forward
from mnemon.hf.kinds import LayerSpec
from mnemon.layers import CacheLayer
from mnemon.policies import build_all
from mnemon.recipe import parse


class Module(torch.nn.Module):
    """What transformers' attention functions ask of an attention module."""

    is_causal = True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60, help="before the drop")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt; 0: none")
    parser.add_argument("--formats", nargs="*", default=["dense", "int4"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep = given.tokens
    terms = [
        "", f"window({keep})", f"sinks(4) + window({keep - 4})", f"random(keep={keep})",
        f"h2o(keep={keep})", f"tova(keep={keep})",
    ]  # fmt: skip
    print(f"{given.device}, {torch.get_num_threads()} threads, bfloat16, batch 1, {keep} tokens, "
          f"{given.heads} heads / {given.kv_heads} x {given.width}")  # fmt: skip
    print(f"{'recipe':34}{'step ms':>9}{'drop ms':>9}{'mean ms':>9}{'x plain':>9}")
    for form in given.formats:
        recipes = [f"{term} + {form}" if term else form for term in terms]
        layers = [build_all([LayerSpec()], parse(recipe))[0] for recipe in recipes]
        steps, drops = measured(layers, given)
        period = keep // 16 + 1
        plain = 0.0
        for recipe, step, drop in zip(recipes, steps, drops, strict=True):
            mean = step if drop is None else step + (drop - step) / period
            plain = plain or mean
            shown = "-" if drop is None else f"{drop:.2f}"
            print(f"{recipe:34}{step:9.3f}{shown:>9}{mean:9.3f}{mean / plain:9.2f}")
    if given.prompt:
        print(f"\na prompt of {given.prompt} tokens, of which a quarter stays")
        print(f"{'recipe':34}{'ms':>9}{'x plain':>9}")
        plain = 0.0
        for term in ("", "window(0.25)", "random(keep=0.25)", "h2o(keep=0.25)", "tova(keep=0.25)"):
            taken = prompt_ms(term or "dense", given)
            plain = plain or taken
            print(f"{term or 'dense':34}{taken:9.1f}{taken / plain:9.2f}")


@torch.no_grad()
def prompt_ms(recipe: str, given: argparse.Namespace) -> float:
    """Milliseconds of one layer's append, attention and policy of a prompt, the best of three."""
    draw = torch.Generator(given.device).manual_seed(0)
    shapes = [(1, heads, given.prompt, given.width) for heads in (given.heads, given.kv_heads)]
    query, keys = (
        torch.randn(shape, generator=draw, dtype=torch.bfloat16, device=given.device)
        for shape in shapes
    )
    module, times = Module(), []
    module.num_key_value_groups = given.heads // given.kv_heads
    for _ in range(3):
        (layer,) = build_all([LayerSpec()], parse(recipe))
        begin = _clock(given.device)()
        attention_forward(module, query, *layer.append(keys, keys), None)
        if given.device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (_clock(given.device)() - begin))
    return min(times)


def _clock(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" else time.perf_counter


@torch.no_grad()
def measured(
    layers: list[CacheLayer], given: argparse.Namespace
) -> tuple[list[float], list[float | None]]:
    """Milliseconds of a step and of a drop, per layer."""
    draw = torch.Generator(given.device).manual_seed(0)

    def numbers(heads: int, count: int) -> torch.Tensor:
        shape = (1, heads, count, given.width)
        return torch.randn(shape, generator=draw, dtype=torch.bfloat16, device=given.device)

    warm = 5
    for layer in layers:
        count = given.tokens - given.steps - warm
        keys, _ = layer.append(numbers(given.kv_heads, count), numbers(given.kv_heads, count))
        if isinstance(keys, WatchedTensor):
            # A prompt's attention is not what is measured.
            keys.watch.told(Seen(None, torch.rand(keys.shape[:3], device=given.device), False))
    module = Module()
    clock = _clock(given.device)
    query, key = numbers(given.heads, 1), numbers(given.kv_heads, 1)
    times: list[list[float]] = [[] for _ in layers]
    drops: list[float | None] = [None for _ in layers]
    for step in range(warm + given.steps + 1):
        for index, layer in enumerate(layers):
            before = layer.num_stored
            begin = clock()
            attention_forward(module, query, *layer.append(key, key), None)
            if given.device != "cpu":
                torch.cuda.synchronize()
            taken = 1000 * (clock() - begin)
            if layer.num_stored < before:
                drops[index] = taken
            elif step >= warm:
                times[index].append(taken)
    return [statistics.median(found) for found in times], drops


if __name__ == "__main__":
    main()
