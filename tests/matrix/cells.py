"""One cell of the matrix: an architecture, a mode, and with or without `attach`."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import lru_cache

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mnemon.errors import NotServed, RecipeError
from mnemon.hf.kinds import layer_specs
from mnemon.hf.versions import installed
from mnemon.hf.versions.supported import release

from .architectures import rows
from .modes import (
    MODES,
    STATIC,
    TURNS,
    Bench,
    MakeCache,
    default_cache,
    dynamic_cache,
    mnemon_cache,
    static_reference,
)

RELEASE = release(installed)
EQUAL, DIFFERENT, ERROR, NOT_APPLICABLE = "equal", "different", "error", "n/a"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one cell showed.

    Attributes:
        kind: equal, different, error, or n/a where transformers' own cache raises.
        detail: the first difference or the error.
    """

    kind: str
    detail: str = ""


#: Rows whose tokens transformers' own cache gets wrong, the last release that does, and why. Cells
#: that differ are compared with what is computed without any cache.
WRONG_IN_TRANSFORMERS: dict[str, tuple[tuple[int, int], str]] = {
    "t5gemma": ((4, 57), "its cross-attention cache is a sliding one, and drops encoder tokens"),
    "deepseek_v4": ((5, 22), "beam search does not reorder its compressed states"),
}


def why_refused(row: str) -> str | None:
    """Why mnemon has no cache for a row in this release of transformers; None if it has."""
    try:
        layer_specs(CONFIG_MAPPING[rows()[row].model_type]())
    except NotServed as error:
        return str(error)
    except Exception:  # a default config that describes no model says nothing
        return None
    return None


@lru_cache(maxsize=2)
def bench(row: str) -> Bench:
    """The model of a row. Rows are visited one after the other: two are kept."""
    return Bench(*rows()[row].build())


@lru_cache(maxsize=64)
def reference(row: str, mode: str) -> Tensor | Exception:
    """The tokens of transformers' default cache, or what it raised.

    In turns on one conversation, it is one DynamicCache that serves all turns. For `static(n)` it
    is the default cache too, if transformers' StaticCache works: it raises nothing and agrees.
    """
    make_cache = dynamic_cache if mode in TURNS else default_cache
    try:
        tokens = MODES[mode](bench(row), make_cache)
        if mode in STATIC and not torch.equal(tokens, static_reference(bench(row), mode)):
            raise ValueError("StaticCache gives other tokens than DynamicCache")
    except Exception as error:  # whatever it is: the cell is n/a, and its type is shown
        return error
    return tokens


@lru_cache(maxsize=64)
def recomputed(row: str, mode: str) -> Tensor:
    """The tokens of a conversation in which transformers computes everything again in each turn."""
    return MODES[mode](bench(row), default_cache)


def compare(expected: Tensor, got: Tensor) -> Outcome:
    """Exact equality of tokens [batch, tokens]."""
    if expected.shape != got.shape:
        return Outcome(kind=DIFFERENT, detail=f"shape {tuple(got.shape)}, {tuple(expected.shape)}")
    wrong = (expected != got).nonzero()
    if len(wrong) == 0:
        return Outcome(kind=EQUAL)
    where = tuple(wrong[0].tolist())
    return Outcome(
        kind=DIFFERENT,
        detail=f"{len(wrong)} of {got.numel()} tokens, first at {where}: "
        f"{int(got[where])}, expected {int(expected[where])}",
    )


@lru_cache(maxsize=64)
def uncached(row: str, mode: str) -> Tensor:
    """The tokens that transformers computes without any cache."""
    return MODES[mode](bench(row).without_cache(), default_cache)


def judge(row: str, mode: str, attached: bool, make_cache: MakeCache = mnemon_cache) -> Outcome:
    """Run one cell."""
    refusal = why_refused(row)
    if refusal is not None:
        return Outcome(kind=NOT_APPLICABLE, detail=f"mnemon: {refusal}")
    expected = reference(row, mode)
    if isinstance(expected, Exception):
        return Outcome(kind=NOT_APPLICABLE, detail=f"transformers: {_in_words(expected)}")
    model = bench(row).model
    with contextlib.ExitStack() as stack:
        if attached:
            import mnemon

            stack.enter_context(mnemon.attach(model))
        try:
            got = MODES[mode](bench(row), make_cache)
        except RecipeError as error:
            # A test names the rows for which static(n) is refused.
            return Outcome(kind=NOT_APPLICABLE, detail=f"mnemon: {_in_words(error)}")
        except Exception as error:  # reported as the cell's outcome, which fails its test
            return Outcome(kind=ERROR, detail=_in_words(error))
    outcome = compare(expected, got)
    if outcome.kind == DIFFERENT and attached and mode in TURNS:
        # For recurrent models `generate` feeds the whole conversation again on top of the state:
        # transformers' reuse disagrees with transformers. Attached, the state is used as it should.
        fresh = recomputed(row, mode)
        if compare(expected, fresh).kind == DIFFERENT and compare(fresh, got).kind == EQUAL:
            return Outcome(kind=EQUAL, detail="as recomputed; transformers' reuse is wrong")
    last_wrong, _ = WRONG_IN_TRANSFORMERS.get(row, ((0, 0), ""))
    if outcome.kind == DIFFERENT and last_wrong >= RELEASE:
        fresh = uncached(row, mode)
        if compare(expected, fresh).kind == DIFFERENT and compare(fresh, got).kind == EQUAL:
            return Outcome(kind=EQUAL, detail="as without a cache; transformers' cache is wrong")
    return outcome


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
