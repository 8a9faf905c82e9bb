"""Which peers run on this DiT, what they compute, how near they stay and what they leave behind.

    python benchmarks/peers/diffusion/check.py --pipe FOLDER --cache-dit /tmp/peer_cache_dit
    python benchmarks/peers/diffusion/check.py --pipe FOLDER --cache-dit ... --defects

Without --pipe: random weights, which show only what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contenders import GUIDANCE, STEPS, Peer, peers
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiTPipeline

IMAGES = 32


def random_pipeline() -> DiTPipeline:
    """Weights from a seed, with the zeros of adaptive norms replaced."""
    from mnemon.diffusion.digits.architecture import build_pipeline, build_transformer

    model = build_transformer("base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.02, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return build_pipeline(model)


def generate(pipe: DiTPipeline, seed: int = 0) -> Tensor:
    """32 images in [-1, 1] of the classes 0 to 9, again and again."""
    images: Any = pipe(
        class_labels=[i % 10 for i in range(IMAGES)],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images * 2 - 1


def psnr(images: Tensor, reference: Tensor) -> float:
    """In decibels; the values span 2."""
    error = (images - reference).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


@dataclasses.dataclass(slots=True)
class Work:
    """What ran. Rows are counted, since FasterCache halves batches."""

    attention: int = 0
    feed_forward: int = 0
    macs: int = 0


@contextlib.contextmanager
def counted(transformer: nn.Module) -> Iterator[Work]:
    """Counts below what a cache replaces: a module whose `forward` is skipped is still called."""
    work, hooks = Work(), []

    def linear(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        work.macs += inputs[0].numel() * module.out_features

    def attention(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        rows, tokens, width = inputs[0].shape
        work.attention += rows
        work.macs += 2 * rows * tokens**2 * width

    def feed_forward(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        work.feed_forward += len(inputs[0])

    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(linear))
    for block in transformer.transformer_blocks:
        hooks.append(block.attn1.to_q.register_forward_hook(attention))
        hooks.append(block.ff.net[0].proj.register_forward_hook(feed_forward))
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    pipe: DiTPipeline, peer: Peer, reference: Tensor, full: Work, runs: int
) -> dict[str, Any]:
    """One row of the table."""
    seconds, images, work = [], reference, Work()
    for run in range(runs):
        with peer.apply(pipe), counted(pipe.transformer) as counts:
            start = time.perf_counter()
            images = generate(pipe)
            seconds.append(time.perf_counter() - start)
        if run == 0:
            work = counts
    return {
        "peer": peer.name,
        "package": peer.package,
        "method": peer.method,
        "attention": work.attention / full.attention,
        "feed_forward": work.feed_forward / full.feed_forward,
        "macs": work.macs / full.macs,
        "psnr": psnr(images, reference),
        "seconds": statistics.median(seconds),
    }


def said(error: Exception) -> str:
    """One line of it."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:110]


def table(pipe: DiTPipeline, chosen: list[Peer], runs: int, out: Path | None) -> None:
    """Prints a row for each peer."""
    with counted(pipe.transformer) as full:
        start = time.perf_counter()
        reference = generate(pipe)
        seconds = time.perf_counter() - start
    print(f"{'':74} {'attn':>5} {'ff':>5} {'MACs':>5} {'PSNR':>6} {'s':>6}")
    print(f"{'uncached':74} {1:5.2f} {1:5.2f} {1:5.2f} {'-':>6} {seconds:6.2f}")
    rows = []
    for steps in (14, 10, 7):
        fewer = fewer_steps(pipe, steps, reference)
        rows.append(fewer)
    for peer in chosen:
        try:
            rows.append(row := measure(pipe, peer, reference, full, runs))
        except Exception as error:
            rows.append(row := {"peer": peer.name, "error": peer.error or said(error)})
        show(row, peer.error)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def fewer_steps(pipe: DiTPipeline, steps: int, reference: Tensor) -> dict[str, Any]:
    """The plain alternative to caching."""
    start = time.perf_counter()
    images: Any = pipe(
        class_labels=[i % 10 for i in range(IMAGES)],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    share = steps / STEPS
    row = {
        "peer": f"{steps} steps, uncached",
        "package": "-",
        "method": "fewer steps",
        "attention": share,
        "feed_forward": share,
        "macs": share,
        "psnr": psnr(images * 2 - 1, reference),
        "seconds": time.perf_counter() - start,
    }
    show(row, None)
    return row


def show(row: dict[str, Any], expected: str | None) -> None:
    """Prints one row."""
    if "error" in row:
        print(f"{row['peer']:74} {row['error']}", flush=True)
        return
    shares = " ".join(f"{row[k]:5.2f}" for k in ("attention", "feed_forward", "macs"))
    note = f"  ({expected})" if expected else ""
    print(f"{row['peer']:74} {shares} {row['psnr']:6.2f} {row['seconds']:6.2f}{note}", flush=True)


def defects(pipe: DiTPipeline, chosen: list[Peer]) -> None:
    """For the first peer of each method that runs: what it leaves, and does it repeat itself."""
    reference = generate(pipe)
    names = list(pipe.transformer.state_dict())
    seen: set[str] = set()
    for peer in chosen:
        method = f"{peer.package} {peer.method} {peer.settings.get('target', '')}".strip()
        if peer.error is not None or method in seen:
            continue
        seen.add(method)
        print(method, f"({peer.name})")
        try:
            with peer.apply(pipe):
                images = [generate(pipe) for _ in range(4)]
        except Exception as error:
            print("  ", said(error))
            continue
        print(
            "   the same seed four times, no reset:",
            len({tensor_key(i) for i in images}),
            "result(s)",
        )
        clean = (
            torch.equal(generate(pipe), reference) and list(pipe.transformer.state_dict()) == names
        )
        print("   afterwards bit-equal to uncached:", "yes" if clean else "NO", flush=True)


def tensor_key(images: Tensor) -> bytes:
    """Equal for equal tensors."""
    return images.numpy().tobytes()


def functions_alone(pipe: DiTPipeline) -> None:
    """diffusers' `apply_*` on DiT as it is: no `CacheMixin`, no cache context."""
    from diffusers import hooks

    def first_block(model: nn.Module) -> None:
        hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig())

    def taylor_seer(model: nn.Module) -> None:
        hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig())

    def attention_broadcast(model: nn.Module) -> None:
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3, current_timestep_callback=lambda: 500
        )
        hooks.apply_pyramid_attention_broadcast(model, config)

    for function in (first_block, taylor_seer, attention_broadcast):
        model = copy.deepcopy(pipe.transformer)
        alone = type(pipe)(transformer=model, vae=pipe.vae, scheduler=pipe.scheduler)
        alone.set_progress_bar_config(disable=True)
        function(model)
        hooked = sum(hasattr(module, "_diffusers_hook") for module in model.modules())
        print(f"diffusers {function.__name__}, the function alone: {hooked} modules hooked")
        try:
            found = {tensor_key(generate(alone)) for _ in range(4)}
            print("   the same seed four times, no reset:", len(found), "result(s)")
        except Exception as error:
            print("  ", said(error))


def two_pipelines(first: DiTPipeline, second: DiTPipeline) -> None:
    """cache-dit on two pipelines of one class, which it patches; none works afterwards."""
    import cache_dit

    def config() -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=0.2,
            max_warmup_steps=2,
            num_inference_steps=STEPS,
            enable_separate_cfg=False,
        )

    third = type(first)(
        transformer=copy.deepcopy(first.transformer), vae=first.vae, scheduler=first.scheduler
    )
    third.set_progress_bar_config(disable=True)
    for pipe in (first, second):
        cache_dit.enable_cache(pipe, cache_config=config())
    print("cache-dit, two pipelines of one class, both cached")
    runs(first, "the first")
    runs(second, "the second")
    cache_dit.disable_cache(first)
    print("   and after disable_cache(first)")
    runs(second, "the second")
    runs(third, "a third, never cached")


def runs(pipe: DiTPipeline, name: str) -> None:
    """Says whether it does."""
    try:
        generate(pipe)
        print(f"   {name} runs")
    except Exception as error:
        print(f"   {name}: {said(error)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", type=Path, help="the folder of a DiTPipeline")
    parser.add_argument("--cache-dit", type=Path, help="the folder it was installed into")
    parser.add_argument("--only", default="", help="peers whose name has this in it")
    parser.add_argument("--runs", type=int, default=3, help="for the seconds' median")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument("--defects", action="store_true")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    from diffusers.utils import logging as diffusers_logging

    from mnemon.diffusion.digits import load_pipeline

    diffusers_logging.set_verbosity_error()
    chosen = [p for p in peers(cache_dit=given.cache_dit) if given.only in p.name]
    pipe = load_pipeline(given.pipe) if given.pipe else random_pipeline()
    if not given.defects:
        table(pipe, chosen, given.runs, given.out)
        return
    logging.basicConfig(level=logging.WARNING, format="   %(message)s")
    logging.getLogger("peers").setLevel(logging.INFO)
    defects(pipe, chosen)
    functions_alone(pipe)
    two_pipelines(pipe, load_pipeline(given.pipe) if given.pipe else random_pipeline())


if __name__ == "__main__":
    main()
