"""Feature caches of other packages on a `DiTPipeline`: what exists, and how each is switched on.

    for peer in peers():
        with peer.apply(pipe):          # fresh state, for ONE generation
            images = pipe(...).images   # on exit everything is as it was before

diffusers is called through `CacheMixin`, cache-dit through `enable_cache` and `disable_cache`.
README.md says what each needed to run on DiT.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiTPipeline

__all__ = ["Peer", "peers"]

STEPS = 20
GUIDANCE = 2.0
EVERY_TIMESTEP = (-1, 1000)  # both ends are open

log = logging.getLogger("peers")
Apply = Callable[["DiTPipeline"], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One method of one package with one choice of settings.

    Args:
        name: as shown in tables, unlike every other one.
        package: whose code runs.
        method: its name, shared by all settings.
        settings: what the package is given.
        apply: switches the cache on for one generation, and off on exit.
        error: why it does not run on DiT; `apply` then raises what the package raises.
    """

    name: str
    package: Literal["diffusers", "cache-dit"]
    method: str
    settings: Mapping[str, Any]
    apply: Apply
    error: str | None = None


def peers(steps: int = STEPS, cache_dit: str | os.PathLike[str] | None = None) -> list[Peer]:
    """Every method with settings from mild to aggressive.

    Args:
        steps: of the generations, which MagCache and cache-dit must know beforehand.
        cache_dit: the folder cache-dit was installed into, put on `sys.path`; by default what the
            environment variable PEER_CACHE_DIT says. Neither: wherever Python finds it.
    """
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    folder = cache_dit or os.environ.get("PEER_CACHE_DIT")
    if folder and str(Path(folder)) not in sys.path:
        sys.path.append(str(Path(folder)))
    found = [*_of_diffusers(steps), *_of_cache_dit(steps)]
    if os.environ.get("PEER_FRONT"):
        # A first pass over all settings (check.py) chose these: of each method, the best two in
        # every tenth of the cost, without what one of its own other settings beats by far.
        names = set(json.loads(Path(os.environ["PEER_FRONT"]).read_text()))
        found = [peer for peer in found if peer.name in names]
    return found


# ---------------------------------------------------------------------------- switching on and off


@contextlib.contextmanager
def _tidied(pipe: DiTPipeline) -> Iterator[None]:
    """Removes on exit whatever the package's own way out left on the pipeline, and logs it."""
    modules = list(pipe.transformer.modules())
    objects: list[Any] = [type(pipe), pipe, *modules]
    before = [dict(vars(thing)) for thing in objects]
    children = [dict(module._modules) for module in modules]
    kind = type(pipe.transformer)
    try:
        yield
    finally:
        found: Counter[str] = Counter()
        pipe.transformer.__class__ = kind
        for module, was in zip(modules, children, strict=True):
            if dict(module._modules) != was:
                found["submodule " + ", ".join(module._modules.keys() - was.keys())] += 1
                module._modules.clear()
                module._modules.update(was)
        for thing, was in zip(objects, before, strict=True):
            for name, value in list(vars(thing).items()):
                if name in was and was[name] is value:
                    continue
                found[f"{type(thing).__name__ if isinstance(thing, type) else ''}.{name}"] += 1
                if name in was:
                    setattr(thing, name, was[name])
                else:
                    delattr(thing, name)
        if found:
            log.info("left behind: %s", ", ".join(f"{k} x {n}" for k, n in sorted(found.items())))


class _Now:
    """The timestep of the transformer call that runs; `DiTPipeline` does not tell it."""

    timestep = 1000

    def __call__(self) -> int:
        return self.timestep


@contextlib.contextmanager
def _diffusers(
    pipe: DiTPipeline,
    config: Callable[[DiTPipeline, _Now], Any],
    *,
    unconditional_first: bool = False,
) -> Iterator[None]:
    """diffusers' cache of this configuration.

    `DiTTransformer2DModel` lacks `CacheMixin`, and `DiTPipeline` never opens a cache context; a
    pipeline that supports caching does what `forward` does here.
    """
    from diffusers.models.cache_utils import CacheMixin

    transformer: Any = pipe.transformer
    now = _Now()
    chosen = config(pipe, now)  # may generate an image, to calibrate
    with _tidied(pipe):
        kind = type(transformer)
        transformer.__class__ = type(kind.__name__, (CacheMixin, kind), {})
        transformer.enable_cache(chosen)
        cached = transformer.forward

        def forward(
            hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
        ) -> Any:
            now.timestep = int(timestep[0])
            if unconditional_first:
                hidden_states, timestep, class_labels = map(
                    _halves_swapped, (hidden_states, timestep, class_labels)
                )
            with transformer.cache_context("cond", **_place(pipe.scheduler, now.timestep)):
                output = cached(
                    hidden_states=hidden_states,
                    timestep=timestep,
                    class_labels=class_labels,
                    return_dict=return_dict,
                )
            if unconditional_first:
                output.sample = _halves_swapped(output.sample)
            return output

        transformer.forward = forward
        try:
            yield
        finally:
            transformer.forward = cached
            transformer.disable_cache()


def _halves_swapped(batch: Tensor) -> Tensor:
    first, second = batch.chunk(2)
    return torch.cat([second, first])


def _place(scheduler: Any, timestep: int) -> dict[str, Any]:
    steps = scheduler.timesteps.tolist()
    kept = scheduler.alphas_cumprod[timestep]  # variance preserving: x = sqrt(kept) image + ...
    noise, image = (1 - kept).sqrt().item(), kept.sqrt().item()
    return {
        "step_index": steps.index(timestep),
        "num_inference_steps": len(steps),
        "timestep": timestep,
        "sigma": noise / (noise + image),  # of the same point on a straight path
    }


@contextlib.contextmanager
def _cache_dit(
    pipe: DiTPipeline,
    cache: Mapping[str, Any],
    calibrator: Mapping[str, Any] | None = None,
    *,
    prune: bool = False,
    target: Literal["pipeline", "transformer", "wrapped", "pattern 2"] = "pipeline",
) -> Iterator[None]:
    """cache-dit's DBCache or DBPrune."""
    import cache_dit

    with _tidied(pipe):
        config = (cache_dit.DBPruneConfig if prune else cache_dit.DBCacheConfig)(
            enable_separate_cfg=False, **cache
        )
        transformer: Any = pipe.transformer
        given: Any = pipe
        if target == "transformer":
            given = transformer
        elif target != "pipeline":
            from cache_dit.caching.patch_functors import DiTPatchFunctor

            blocks = transformer.transformer_blocks
            if target == "wrapped":
                blocks = nn.ModuleList([_TwoStreams(block) for block in blocks])
            given = cache_dit.BlockAdapter(
                pipe=pipe,
                transformer=transformer,
                blocks=blocks,
                blocks_name="transformer_blocks",
                forward_pattern=cache_dit.ForwardPattern.Pattern_2,
                patch_functor=DiTPatchFunctor(),
                check_forward_pattern=False,
            )
        cache_dit.enable_cache(
            given, cache_config=config, calibrator_config=_calibrator(cache_dit, calibrator)
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(transformer if target == "transformer" else pipe)


def _calibrator(cache_dit: Any, given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return None
    rest = dict(given)
    kind = rest.pop("kind")
    return {
        "TaylorSeer": cache_dit.TaylorSeerCalibratorConfig,
        "FoCa": cache_dit.FoCaCalibratorConfig,
        "DMD": cache_dit.DMDCalibratorConfig,
    }[kind](**rest)


class _TwoStreams(nn.Module):
    """A DiT block behind the signature cache-dit's pattern 2 calls."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        return self.block(hidden_states, encoder_hidden_states=encoder_hidden_states, **rest)


# ------------------------------------------------------------------------------ diffusers' methods


def _of_diffusers(steps: int) -> Iterator[Peer]:
    for threshold in (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4):
        yield _peer_of_diffusers("FirstBlockCache", "FirstBlockCacheConfig", threshold=threshold)
    yield from _taylor_seers()
    for reach, timesteps in itertools.product((2, 3, 4, 6), ((100, 800), EVERY_TIMESTEP)):
        yield _peer_of_diffusers(
            "PyramidAttentionBroadcast",
            "PyramidAttentionBroadcastConfig",
            spatial_attention_block_skip_range=reach,
            spatial_attention_timestep_skip_range=timesteps,
        )
    for reach, timesteps, alpha in itertools.product((2, 3, 5), ((-1, 641), (-1, 901)), (1.0, 1.1)):
        yield _peer_of_diffusers(
            "FasterCache",
            "FasterCacheConfig",
            unconditional_batch_skip_range=reach,
            unconditional_batch_timestep_skip_range=timesteps,
            spatial_attention_timestep_skip_range=timesteps,
            alpha_low_frequency=alpha,
            alpha_high_frequency=alpha,
        )
    calibration = _Calibration(steps)
    for threshold, reach, retained in [
        *itertools.product((0.03, 0.06, 0.12, 0.24), (1, 2, 3), (0.2,)),
        *itertools.product((0.24, 0.5), (1, 2, 4), (0.05,)),
    ]:
        given = {"threshold": threshold, "max_skip_steps": reach, "retention_ratio": retained}
        yield Peer(
            name=_name("MagCache", given),
            package="diffusers",
            method="MagCache",
            settings=given,
            apply=partial(_diffusers, config=partial(_mag, calibration=calibration, given=given)),
        )
    for threshold, order, reach in itertools.product((0.1, 0.25, 0.5, 1.0), (0, 1), (1, 2, 3)):
        yield _peer_of_diffusers(
            "SeaCache",
            "SeaCacheConfig",
            threshold=threshold,
            residual_order=order,
            max_consecutive_cached=reach,
        )


# Its own identifiers want names that end in `attn`, and so match nothing in DiT, whose attention is
# `attn1`.
_BLOCK = r"transformer_blocks\.\d+"
TAYLOR_PLACES: dict[str, dict[str, list[str]]] = {
    "attention": {"cache_identifiers": [_BLOCK + r"\.attn1"]},
    "sublayers": {"cache_identifiers": [_BLOCK + r"\.(attn1|ff)"]},
    # What its "lite mode" does where names fit: blocks give zeros, the model's last layer is
    # predicted.
    "output": {"cache_identifiers": ["proj_out_2"], "skip_predict_identifiers": [_BLOCK]},
}


def _taylor_seers() -> Iterator[Peer]:
    method = "TaylorSeer"
    yield _peer_of_diffusers(
        method,
        "TaylorSeerCacheConfig",
        cache_interval=3,
        error="its default identifiers match no module of DiT: nothing is cached, nothing is said",
    )
    for where, interval, order, before in [
        *itertools.product(("attention",), (2, 3, 4), (1,), (3,)),
        *itertools.product(("sublayers", "output"), (2, 3, 4), (0, 1, 2), (1, 2, 3)),
    ]:
        yield _peer_of_diffusers(
            method,
            "TaylorSeerCacheConfig",
            where=where,
            cache_interval=interval,
            max_order=order,
            disable_cache_before_step=before,
            taylor_factors_dtype=torch.float32,
        )
    yield _peer_of_diffusers(
        method,
        "TaylorSeerCacheConfig",
        where="sublayers",
        cache_interval=2,
        max_order=1,
        disable_cache_before_step=3,
        taylor_factors_dtype=torch.bfloat16,  # its default
    )


def _peer_of_diffusers(method: str, config: str, error: str | None = None, **given: Any) -> Peer:
    return Peer(
        name=_name(method, given),
        package="diffusers",
        method=method,
        settings=given,
        error=error,
        apply=partial(
            _diffusers,
            config=partial(_configured, name=config, given=given),
            unconditional_first=method == "FasterCache",
        ),
    )


def _configured(pipe: DiTPipeline, now: _Now, *, name: str, given: dict[str, Any]) -> Any:
    from diffusers import hooks

    rest = {k: v for k, v in given.items() if k != "where"}
    if "where" in given:
        rest |= TAYLOR_PLACES[given["where"]]
    if name in ("PyramidAttentionBroadcastConfig", "FasterCacheConfig"):
        rest["current_timestep_callback"] = now
    if name == "FasterCacheConfig":
        rest |= {
            "tensor_format": "BCHW",
            "attention_weight_callback": lambda _: 0.5,
            "_unconditional_conditional_input_kwargs_identifiers": (
                "hidden_states",
                "timestep",
                "class_labels",
            ),
        }
    if name == "SeaCacheConfig":
        rest["raw_vision_callback"] = _latents
    return getattr(hooks, name)(**rest)


def _latents(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    batch: Tensor = kwargs["hidden_states"]
    images = batch[: max(1, len(batch) // 2)]  # guidance has each image twice
    return [images.flatten(0, 1)[:, None]]  # (channels, frames, height, width): one picture of many


class _Calibration:
    """MagCache's ratios of each transformer, measured once, on other noise than is compared.

    Args:
        steps: of the generations.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._ratios: WeakKeyDictionary[nn.Module, list[float]] = WeakKeyDictionary()

    def ratios(self, pipe: DiTPipeline) -> list[float]:
        """Those of this pipeline's transformer, whose weights must not have changed since."""
        from diffusers.hooks import MagCacheConfig

        if pipe.transformer not in self._ratios:
            config = MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
            shown = io.StringIO()  # printing is the only way they come out
            with contextlib.redirect_stdout(shown), _diffusers(pipe, lambda *_: config):
                pipe(
                    class_labels=list(range(10)),
                    num_inference_steps=self.steps,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator(pipe.device).manual_seed(20_260),
                    output_type="pt",
                )
            found = re.search(r"^\[.*\d\]$", shown.getvalue(), re.MULTILINE)
            assert found is not None, shown.getvalue()
            self._ratios[pipe.transformer] = ast.literal_eval(found[0])
        return self._ratios[pipe.transformer]


def _mag(pipe: DiTPipeline, _: _Now, *, calibration: _Calibration, given: dict[str, Any]) -> Any:
    from diffusers.hooks import MagCacheConfig

    ratios = calibration.ratios(pipe)
    return MagCacheConfig(mag_ratios=ratios, num_inference_steps=calibration.steps, **given)


# ------------------------------------------------------------------------------ cache-dit's methods

_SHORT = {
    "Fn_compute_blocks": "F",
    "Bn_compute_blocks": "B",
    "residual_diff_threshold": "threshold",
    "max_continuous_cached_steps": "continuous",
    "steps_computation_policy": "policy",
    "spatial_attention_block_skip_range": "range",
    "spatial_attention_timestep_skip_range": "timesteps",
    "unconditional_batch_skip_range": "range",
    "unconditional_batch_timestep_skip_range": "timesteps",
    "alpha_low_frequency": "alpha",
    "max_skip_steps": "skip",
    "retention_ratio": "retain",
    "residual_order": "order",
    "max_consecutive_cached": "continuous",
    "cache_interval": "interval",
    "max_order": "order",
    "disable_cache_before_step": "before",
    "taylorseer_order": "order",
}
_HIDDEN = {
    "max_warmup_steps",
    "steps_computation_mask",
    "num_inference_steps",
    "alpha_high_frequency",
}


def _name(method: str, given: Mapping[str, Any]) -> str:
    words = [method]
    for key, value in given.items():
        shown = str(value).removeprefix("torch.").replace(" ", "")
        repeated = key == "spatial_attention_timestep_skip_range" and method == "FasterCache"
        if key in _HIDDEN or repeated or shown == "float32" or value is None:
            continue
        words.append(
            shown if isinstance(value, str | torch.dtype) else f"{_SHORT.get(key, key)}={shown}"
        )
    return " ".join(words)


def _of_cache_dit(steps: int) -> Iterator[Peer]:
    db = partial(_peer_of_cache_dit, "DBCache", steps)
    thresholds = (0.05, 0.1, 0.2, 0.4)
    for threshold, continuous in itertools.product(thresholds, (-1, 1, 2, 3)):
        yield db(threshold=threshold, continuous=continuous)
    for (first, last), threshold in itertools.product(((2, 0), (4, 0), (1, 1), (2, 2)), thresholds):
        yield db(first=first, last=last, threshold=threshold, continuous=2)
    yield db(threshold=0.2, continuous=2, target="transformer")

    taylor = {"kind": "TaylorSeer", "taylorseer_order": 1}
    calibrated = partial(_peer_of_cache_dit, "DBCache+calibrator", steps)
    for threshold, continuous in itertools.product((0.1, 0.2, 0.4), (1, 2, 3)):
        yield calibrated(threshold=threshold, continuous=continuous, calibrator=taylor)
    for continuous in (1, 2):
        for other in ({**taylor, "taylorseer_order": 2}, {"kind": "FoCa"}, {"kind": "DMD"}):
            yield calibrated(threshold=0.4, continuous=continuous, calibrator=other)

    masked = partial(_peer_of_cache_dit, "DBCache+steps mask", steps, continuous=-1)
    for mask, policy, calibrator in itertools.product(
        ("slow", "medium", "fast", "ultra"), ("dynamic", "static"), (None, taylor)
    ):
        yield masked(threshold=0.2, mask=mask, policy=policy, calibrator=calibrator)
    for interval, calibrator in itertools.product(
        (2, 3, 4), (None, taylor, {**taylor, "taylorseer_order": 2})
    ):
        yield masked(
            threshold=0.2, mask=f"every {interval}", policy="static", calibrator=calibrator
        )

    prune = partial(_peer_of_cache_dit, "DBPrune", steps, prune=True, continuous=-1)
    yield prune(
        threshold=0.1,
        error="TypeError: _process_block_outputs() takes 2 positional arguments but 3 were given",
    )
    yield prune(
        threshold=0.1,
        target="pattern 2",
        error="TypeError: BasicTransformerBlock.forward() got multiple values for 'attention_mask'",
    )
    for threshold, continuous in itertools.product((0.05, 0.1, 0.2, 0.4), (-1, 2)):
        yield prune(threshold=threshold, continuous=continuous, target="wrapped")


def _peer_of_cache_dit(
    method: str,
    steps: int,
    *,
    threshold: float,
    continuous: int,
    first: int = 1,
    last: int = 0,
    mask: str | None = None,
    policy: str | None = None,
    calibrator: Mapping[str, Any] | None = None,
    prune: bool = False,
    target: Literal["pipeline", "transformer", "wrapped", "pattern 2"] = "pipeline",
    error: str | None = None,
) -> Peer:
    cache: dict[str, Any] = {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": 2,
        "max_continuous_cached_steps": continuous,
        "num_inference_steps": steps,
    }
    shown: dict[str, Any] = {**cache}
    apply: Apply
    if mask is not None:
        cache["steps_computation_policy"] = policy
        shown = {"mask": mask, "policy": policy}
        apply = partial(_masked, cache=cache, calibrator=calibrator, mask=mask)
    else:
        apply = partial(_cache_dit, cache=cache, calibrator=calibrator, prune=prune, target=target)
    if calibrator is not None:
        shown |= calibrator
    if target != "pipeline":
        shown["target"] = target
    try:
        import cache_dit  # noqa: F401
    except ModuleNotFoundError:
        error = "cache-dit is not installed; see README.md, and set PEER_CACHE_DIT"
    return Peer(
        name=_name(method, shown),
        package="cache-dit",
        method=method,
        settings={**cache, **shown},
        apply=apply,
        error=error,
    )


def _masked(
    pipe: DiTPipeline,
    *,
    cache: Mapping[str, Any],
    calibrator: Mapping[str, Any] | None,
    mask: str,
) -> AbstractContextManager[None]:
    import cache_dit

    steps = cache["num_inference_steps"]
    if mask.startswith("every "):
        interval = int(mask.removeprefix("every "))
        chosen = [int(step < 2 or (step - 1) % interval == 0) for step in range(steps)]
    else:
        chosen = cache_dit.steps_mask(mask_policy=mask, total_steps=steps)
    return _cache_dit(pipe, {**cache, "steps_computation_mask": chosen}, calibrator)
