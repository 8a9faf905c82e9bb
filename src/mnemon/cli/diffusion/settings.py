"""What is compared: methods with their options, by family, and fewer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemon.diffusion import Attachment, Method
    from mnemon.diffusion.methods.fitted import Plan

__all__ = [
    "FEWER_STEPS",
    "UNCACHED",
    "Setting",
    "fewer_steps",
    "grid",
    "learned",
    "of_method",
    "showcase",
]

UNCACHED = "uncached"
FEWER_STEPS = "fewer steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way of making the same images.

    Args:
        family: the method, shared by all its options; what is best at equal cost is told for each.
        name: as shown in tables, unlike every other one.
        library: whose code runs.
        apply: switches it on for one generation and off on exit; gives mnemon's attachment if it
            is one of ours.
        steps: instead of the task's.
        known_error: why it is known not to run.
        any_error: an exception is shown in its row instead of ending the command (others' code).
    """

    family: str
    name: str
    library: str
    apply: Callable[[Any], AbstractContextManager[Any]]
    steps: int | None = None
    known_error: str | None = None
    any_error: bool = False


@contextlib.contextmanager
def _nothing(_: Any) -> Iterator[None]:
    yield None


@contextlib.contextmanager
def _attached(pipe: Any, *, method: Method) -> Iterator[Attachment]:
    from mnemon.diffusion import attach

    with attach(pipe, method) as attached:
        yield attached


def uncached() -> Setting:
    """The pipeline as it is."""
    return Setting(family=UNCACHED, name=UNCACHED, library="", apply=_nothing)


def fewer_steps(steps: int) -> Setting:
    """The plain alternative to caching: the same sampler, uncached, with fewer steps."""
    name = f"{steps} steps, uncached"
    return Setting(family=FEWER_STEPS, name=name, library="", apply=_nothing, steps=steps)


def of_method(method: str | Method, *, name: str | None = None) -> Setting:
    """A method of mnemon's, from its text or as an object.

    Raises:
        DiffusionError: no such method, no such option, or a bad value.
    """
    from mnemon.diffusion import make_method

    made = make_method(method)
    shown = name or (method if isinstance(method, str) else str(method))
    return Setting(
        family=_family(made),
        name=shown,
        library="mnemon",
        apply=partial(_attached, method=made),
    )


def _family(method: Method) -> str:
    options = method.options()
    if options.get("level") == "stack":
        return f"{method.name}, stack"
    if method.name == "dbcache" and options["order"]:
        return "dbcache + taylor"
    return method.name


def learned(folder: Path, steps: int, *, every: bool) -> tuple[list[Setting], list[str]]:
    """The router and the plans that lie beside the pipeline, and a line for what does not.

    Args:
        folder: of the pipeline: ``router-20.safetensors``, ``plan-20-7.safetensors``.
        steps: of the runs, which is what routers and plans are made for.
        every: several thresholds of a router, not only its own.

    Raises:
        DiffusionError: a file is there and cannot be read.
    """
    from mnemon.diffusion import load_router, make_method
    from mnemon.diffusion.methods.fitted import load_plan

    found, missing = [], []
    path = folder / f"router-{steps}.safetensors"
    if path.is_file():
        router = load_router(path)
        found.append(of_method(make_method("l2c", router=router), name="l2c"))
        for share in (0.0, 0.2, 0.4, 0.6, 0.8) if every else ():
            method = make_method("l2c", router=router.with_share(share))
            found.append(of_method(method, name=f"l2c(share={share:g})"))
    else:
        missing.append(
            f"l2c left out: no {path.name} beside the pipeline (mnemon diffusion train-router)"
        )
    plans: dict[int, Plan] = {}
    for path in sorted(folder.glob(f"plan-{steps}-*.safetensors")):
        plan = load_plan(path)
        plans.setdefault(sum(plan.computed), plan)
    for count, plan in sorted(plans.items(), reverse=True):
        name = f"fitted({count} of {steps})"
        found.append(of_method(make_method("fitted", plan=plan), name=name))
    if not plans:
        missing.append(
            f"fitted left out: no plan-{steps}-*.safetensors beside the pipeline (mnemon "
            "diffusion fit)"
        )
    return found, missing


def showcase(steps: int) -> list[Setting]:
    """One or two settings of each family, for a first look."""
    texts = (
        "interval(interval=2)",
        "interval(interval=3, level=stack)",
        "taylor(order=1, interval=2)",
        "taylor(order=1, interval=2, level=stack)",
        "taylor(order=1, interval=3, level=stack)",
        "first_block(threshold=0.15)",
        "dbcache(threshold=0.3, longest=2)",
        "toca(interval=3, ratio=0.1)",
        "duca(interval=3, ratio=0.1)",
    )
    fewer = [fewer_steps(n) for n in _halves(steps)]
    return [*fewer, *(of_method(text) for text in texts)]


def _halves(steps: int) -> list[int]:
    chosen = {round(0.5 * steps), round(0.35 * steps)}
    return sorted((n for n in chosen if 1 <= n < steps), reverse=True)


def grid(steps: int) -> list[Setting]:
    """Every family from mild to aggressive, and fewer steps down to a fifth."""
    lowest = max(1, round(0.2 * steps))
    found = [fewer_steps(n) for n in range(steps - 1, lowest - 1, -1)]
    found += [of_method(text) for text in _texts()]
    return found


def _texts() -> Iterator[str]:
    for level in ("", ", level=stack"):
        for interval in (2, 3, 4, 5):
            yield f"interval(interval={interval}{level})"
        for order in (1, 2):
            for interval in (2, 3, 4):
                for warmup in (1, 3, 5, 8) if interval == 2 else (1, 3):
                    yield f"taylor(order={order}, interval={interval}, warmup={warmup}{level})"
    for threshold in (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        yield f"first_block(threshold={threshold})"
    for series in ("", ", order=1, warmup=2"):
        for threshold in (0.1, 0.2, 0.4):
            for longest in (1, 2, 3):
                yield f"dbcache(threshold={threshold}, longest={longest}{series})"
    for back in (1, 2):
        yield f"dbcache(front=1, back={back}, threshold=0.3, longest=2, order=1, warmup=2)"
    for name in ("toca", "duca"):
        for interval in (2, 3, 4):
            for ratio in (0.1, 0.25, 0.4):
                yield f"{name}(interval={interval}, ratio={ratio})"
