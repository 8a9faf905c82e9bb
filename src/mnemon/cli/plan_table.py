"""What `mnemon plan` computes and prints. Imports neither typer nor rich nor torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mnemon import planner
from mnemon.cli import models, output
from mnemon.errors import ModelError, PlanError
from mnemon.schemes import CODES, PackedFormat

if TYPE_CHECKING:
    from mnemon.bounds import Bound

DEFAULT_CONTEXT = "4096"
MAX_BATCH = 10**9


class Options(NamedTuple):
    """The arguments of `mnemon plan`, as its command line has them."""

    model: str | None = None
    context: str = DEFAULT_CONTEXT
    batch: int = 1
    memory: str | None = None
    dtype: str = "auto"
    source: str | None = None
    cache: str | None = None
    as_json: bool = False


_WITH_VALUE = {
    "--context": "context",
    "-c": "context",
    "--batch": "batch",
    "-b": "batch",
    "--memory": "memory",
    "-m": "memory",
    "--dtype": "dtype",
    "--source": "source",
    "--cache": "cache",
}


def quick_parse(arguments: list[str]) -> Options | None:
    """Read a plain, correct command line; None for everything else, which typer then handles.

    Understands `--name value` and `--name=value`. Help, mistakes and abbreviations return None.
    """
    found: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--json":
            found["as_json"] = True
        elif name in _WITH_VALUE and (not equals or name.startswith("--")):
            text = value if equals else next(words, None)
            if not text or text.startswith("-"):
                return None
            found[_WITH_VALUE[name]] = text
        elif word.startswith("-") or "model" in found:
            return None
        else:
            found["model"] = word
    if "batch" in found:
        text = found["batch"]
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            return None
        found["batch"] = int(text)
        if not 1 <= found["batch"] <= MAX_BATCH:
            return None
    return Options(**found)


def run(
    *,
    model: str | None,
    context: str,
    batch: int,
    memory: str | None,
    dtype: str,
    source: str | None,
    cache: str | None = None,
    as_json: bool,
) -> int:
    """Plan and print.

    Returns:
        The exit code: 3 when a memory was given and nothing fits in it.

    Raises:
        MnemonError: a model or value that cannot be planned.
    """
    plan = make_plan(model, context, batch, memory, dtype, source, cache)
    if as_json:
        output.print_json(plan)
    else:
        print(_text(plan))
    sys.stdout.flush()
    fitting = [row["fits"] for row in plan["recipes"]]
    return output.EXIT_NO if memory is not None and not any(fitting) else output.EXIT_OK


def make_plan(
    model: str | None,
    context: str,
    batch: int,
    memory: str | None,
    dtype: str,
    source: str | None,
    cache: str | None = None,
) -> dict[str, Any]:
    """Everything that `mnemon plan --json` prints."""
    num_tokens = _parsed(output.parse_count, context, "--context")
    memory_bytes = None if memory is None else _parsed(output.parse_bytes, memory, "--memory")
    source_tokens = None if source is None else _parsed(output.parse_count, source, "--source")
    config, name, folder = _read(model)
    facts = planner.plan_model(config)
    saved = planner.model_dtype(config, folder)
    used = models.DTYPE_SHORT_NAMES.get(dtype, dtype)
    used = saved if used == "auto" else used
    if used not in planner.DTYPES:
        raise PlanError(
            f"--dtype: unknown dtype {dtype!r}; valid are auto, {', '.join(planner.DTYPES)}."
        )
    weights = planner.weight_bytes(config, facts, folder, dtype=used, as_saved=used == saved)

    rows = []
    for asked in _offered(cache, num_tokens, facts.model_type):
        stored: dict[str, Any] = {"packed": asked.packed, "bound": asked.bound}
        is_static = asked.static is not None
        plan = planner.plan_cache(
            facts, num_tokens, batch,
            dtype=used, static=asked.static, source=source_tokens, **stored,
        )  # fmt: skip
        row: dict[str, Any] = {
            "recipe": asked.name or plan.recipe,
            "bytes_per_token": plan.token_bytes,
            "cache_bytes": plan.reserved_bytes,
            "stored_bytes": plan.stored_bytes,
            "total_bytes": None if weights is None else plan.reserved_bytes + weights,
        }
        if memory_bytes is not None:
            free = memory_bytes - (weights or 0)
            one = planner.plan_cache(
                facts, num_tokens, 1,
                dtype=used, static=asked.static, source=source_tokens, **stored,
            )  # fmt: skip
            row["fits"] = plan.reserved_bytes <= free
            row["max_context"] = planner.max_context(
                facts, free, batch, dtype=used, static=is_static, **stored
            )
            row["max_batch"] = planner.max_batch(one, free)
        else:
            row |= {"fits": None, "max_context": None, "max_batch": None}
        rows.append(row)
    kinds: dict[str, int] = {}
    for layer in facts.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    return {
        "model": name,
        "model_type": facts.model_type,
        "dtype": used,
        "context": num_tokens,
        "batch": batch,
        "memory_bytes": memory_bytes,
        "weight_bytes": weights,
        "max_position_embeddings": facts.max_tokens,
        "layers": kinds,
        "recipes": rows,
    }


class _Asked(NamedTuple):
    """A recipe of the table, as the planner takes it; without a name the plan's own."""

    static: int | None = None
    packed: PackedFormat | None = None
    bound: Bound | None = None
    name: str = ""


def _offered(cache: str | None, num_tokens: int, model_type: str) -> list[_Asked]:
    """The recipes of the table, the one asked for first."""
    offered = [_Asked()]
    if model_type not in planner.NO_STATIC:
        offered.append(_Asked(static=num_tokens))
    offered += [_Asked(packed=PackedFormat.named(code)) for code in CODES]
    if cache is None:
        return offered
    from mnemon.recipe import parse  # a third of the time in which a plan without it is there

    recipe = parse(cache)
    if recipe.tier is not None:
        raise PlanError(
            f"--cache: {recipe} keeps bytes in a tier, whose share the planner does not know; "
            f"leave {recipe.tier.name} out."
        )
    asked = _Asked(recipe.static_tokens, recipe.packed, recipe.bound, str(recipe))
    return [asked, *offered]


def _parsed(read: Any, text: str, option: str) -> int:
    try:
        value: int = read(text)
    except ValueError as error:
        raise PlanError(f"{option}: {error}") from error
    return value


def _read(model: str | None) -> tuple[dict[str, Any], str, Path | None]:
    """The config, a name for it, and the folder of the weights if there is one."""
    if model and os.path.isfile(model) and model.endswith(".json"):
        path = Path(model)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{model!r} cannot be read as JSON: {error}.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{model!r} holds a {type(config).__name__}; a config is an object.")
        return config, path.resolve().parent.name or model, path.parent
    config, source = models.read_config(model)
    return config, source.name, source.path


def _text(plan: dict[str, Any]) -> str:
    """The plan as people read it."""
    size, count = output.format_bytes, output.format_count
    layers = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in plan["layers"].items())
    head = [
        " · ".join(
            [output.paint(plan["model"], "bold"), plan["model_type"], plan["dtype"], layers]
        ),
        " · ".join(
            [
                f"{count(plan['context'])} tokens x {count_rows(plan['batch'])}",
                f"weights {_or_dash(plan['weight_bytes'], size)}",
                *([] if plan["memory_bytes"] is None else [f"memory {size(plan['memory_bytes'])}"]),
            ]
        ),
    ]
    limit = plan["max_position_embeddings"]
    if limit is not None and plan["context"] > limit:
        head.append(f"note: this model was made for {count(limit)} tokens.")
    with_memory = plan["memory_bytes"] is not None
    header = ["recipe", "bytes/token", "cache", "total"]
    header += ["fits", "max context", "max batch"] if with_memory else []
    rows = []
    for row in plan["recipes"]:
        cells = [
            row["recipe"],
            count(row["bytes_per_token"]),
            size(row["cache_bytes"]),
            _or_dash(row["total_bytes"], size),
        ]
        if with_memory:
            cells += [
                output.paint("yes", "green") if row["fits"] else output.paint("no", "red"),
                _or_dash(row["max_context"], count, "any"),
                _or_dash(row["max_batch"], count, "any"),
            ]
        rows.append(cells)
    tail = [
        "Exact bytes of what is kept; total: with the weights. static(n) takes all at once; the",
        "others grow: dense may reserve 1/8 more on an accelerator, packed formats 1/16.",
    ]
    if plan["weight_bytes"] is None:
        tail.append("-: the weights are not on this machine, nor counted for this architecture.")
        if with_memory:
            tail.append("fits, max context and max batch are for the cache alone.")
    return "\n".join([*head, "", output.plain_table(header, rows), "", *tail])


def count_rows(batch: int) -> str:
    """Write a batch size: "1 row", "8 rows"."""
    return "1 row" if batch == 1 else f"{batch:,} rows"


def _or_dash(value: int | None, write: Any, absent: str = "-") -> str:
    return absent if value is None else str(write(value))
