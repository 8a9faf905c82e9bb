"""What of transformers mnemon rests on, name by name, and whether the installed release changes it.

    python scripts/surface.py             the table; fails if it differs from the record
    python scripts/surface.py --record    write down the installed release

Nothing is listed by hand. Imports are read from mnemon's sources, so a new one cannot be forgotten;
attributes are those that `hf` names and that transformers' classes have; and what transformers asks
of a cache is read from its own sources, so a call that is new is seen too. A release without a
record is compared with the newest record before it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "mnemon"
VERSIONS = SOURCES / "hf" / "versions"
RECORDS = ROOT / "tests" / "hf" / "surface"
SUPPORTED = runpy.run_path(str(VERSIONS / "supported.py"))
#: Rooms that follow older releases on purpose: their names are theirs to look after.
ELSEWHERE = ("legacy", "migrate")

_MISSING = object()
#: Section -> name -> what it is.
Surface = dict[str, dict[str, str]]

# What transformers' own code calls a cache, and what it reads from it or from one of its layers.
_CACHE = (
    r"\b(?:past_key_values?|curr_past_key_values?|layer_past|cache_params|self_attn_past_key_value"
    r"|self_attention_cache|cross_attention_cache|user_defined_cache|past_kv)"
)
_LAYER_READ = re.compile(_CACHE + r"\.layers\[[^\]]+\]\.(\w+)(\()?")
_CACHE_READ = re.compile(_CACHE + r"\.(?!layers\[)(\w+)(\()?")


def imports() -> dict[str, set[str]]:
    """Every name that mnemon imports from transformers -> the files that do."""
    found: dict[str, set[str]] = defaultdict(set)
    adapter = _adapter(transformers.__version__)
    skipped = {path for path in VERSIONS.glob("v*.py") if path.stem not in _chain(adapter)}
    if adapter == "v4_57":
        skipped.add(VERSIONS / "five.py")
    for path in sorted(SOURCES.rglob("*.py")):
        where = path.relative_to(SOURCES)
        if path in skipped or where.parts[0] in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                for alias in node.names:
                    found[f"{node.module}.{alias.name}"].add(where.as_posix())
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "transformers":
                        found[alias.name].add(where.as_posix())
    return found


def attributes() -> dict[str, set[str]]:
    """Attributes of transformers' objects that `hf` names -> the files that do."""
    owners = _owners()
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((SOURCES / "hf").rglob("*.py")):
        for name in _named(ast.parse(path.read_text(encoding="utf-8"))):
            for owner, thing in owners.items():
                if _is_of_transformers(thing, name):
                    found[f"{owner}.{name}"].add(path.relative_to(SOURCES).as_posix())
    return found


def surface() -> Surface:
    """What the installed transformers has of all that."""
    owners = _owners()
    result: Surface = {"imports": {}, "attributes": {}, "classes": {}}
    for name in sorted(imports()):
        result["imports"][name] = _describe(_resolve(name))
    for name in sorted(attributes()):
        owner, _, attribute = name.rpartition(".")
        result["attributes"][name] = _describe(inspect.getattr_static(owners[owner], attribute))
    for owner in ("Cache", "EncoderDecoderCache"):  # what mnemon's caches derive from
        for name in sorted(vars(owners[owner])):
            if not name.startswith("_") or name in ("__init__", "__iter__", "__len__"):
                described = _describe(inspect.getattr_static(owners[owner], name))
                result["classes"][f"{owner}.{name}"] = described
    result["asked of a cache"], result["asked of a layer"] = _asked()
    return result


def compare(expected: Surface, found: Surface) -> list[str]:
    """What differs, one line each."""
    lines = []
    for section in sorted({*expected, *found}):
        before, now = expected.get(section, {}), found.get(section, {})
        for name in sorted({*before, *now}):
            if name not in now:
                lines.append(f"{section}: {name} is gone; it was {before[name]}")
            elif name not in before:
                lines.append(f"{section}: {name} is new: {now[name]}")
            elif before[name] != now[name]:
                lines.append(f"{section}: {name} was {before[name]} and is {now[name]}")
    return lines


def records() -> dict[tuple[int, int], Surface]:
    """What was written down, by release."""
    found = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    return {SUPPORTED["release"](name): record for name, record in sorted(found.items())}


def table(found: Surface) -> Table:
    """Name, what it is, who uses it, and which recorded releases have it."""
    view = Table(title=f"What mnemon rests on in transformers {transformers.__version__}")
    for heading in ("name", "what", "used by", "there in"):
        view.add_column(heading, overflow="fold")
    users = {**imports(), **attributes()}
    known = records()
    for section, names in found.items():
        view.add_section()
        for name, what in names.items():
            there = [f"{a}.{b}" for (a, b), one in known.items() if name in one.get(section, {})]
            by = ", ".join(sorted(users.get(name, {section})))
            view.add_row(name, what, by, " ".join(there))
    return view


def main(arguments: list[str] | None = None) -> int:
    """0 if nothing changed, 1 if something did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--record", action="store_true", help="write the installed release down")
    parser.add_argument("--quiet", action="store_true", help="the differences only")
    options = parser.parse_args(arguments)
    console = Console(width=160, soft_wrap=False)
    found, release = surface(), SUPPORTED["release"](transformers.__version__)
    if options.record:
        RECORDS.mkdir(parents=True, exist_ok=True)
        path = RECORDS / f"{release[0]}.{release[1]}.json"
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        console.print(f"wrote {path.relative_to(ROOT)}")
        return 0
    if not options.quiet:
        console.print(table(found))
    known = records()
    before = max((one for one in known if one <= release), default=None)
    if before is None:
        console.print("There is no record to compare with: run with --record.")
        return 1
    lines = compare(known[before], found)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    count = sum(map(len, found.values()))
    console.print(f"{count} names, {len(lines)} differ from the record of {before[0]}.{before[1]}")
    return int(bool(lines))


def _adapter(version: str) -> str:
    """The adapter of a release; for one that is not supported yet, the newest."""
    try:
        return str(SUPPORTED["adapter_for"](version))
    except ImportError:
        return str(SUPPORTED["ADAPTERS"][-1][2])


def _chain(adapter: str) -> set[str]:
    """An adapter and those that it takes names from."""
    found = {adapter}
    for node in ast.walk(ast.parse((VERSIONS / f"{adapter}.py").read_text())):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.startswith("mnemon.hf.versions.v"):
            found |= _chain(module.rpartition(".")[2])
    return found


def _owners() -> dict[str, Any]:
    configs = transformers.configuration_utils
    config = getattr(configs, "PreTrainedConfig", None) or configs.PretrainedConfig
    return {
        "PreTrainedConfig": config(),
        "PreTrainedModel": transformers.PreTrainedModel,
        "GenerationMixin": transformers.GenerationMixin,
        "GenerationConfig": transformers.GenerationConfig(),
        "AttentionInterface": transformers.AttentionInterface,
        "Cache": transformers.cache_utils.Cache,
        "EncoderDecoderCache": transformers.EncoderDecoderCache,
    }


def _named(tree: ast.AST) -> Iterator[str]:
    """Attributes that a file reads or sets, and words that may name one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier():
                yield node.value


def _is_of_transformers(owner: Any, name: str) -> bool:
    try:
        inspect.getattr_static(owner, name)
    except AttributeError:
        return False
    return not hasattr(torch.nn.Module, name) and not hasattr(object, name)


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute) if module else transformers
    except (ImportError, AttributeError):
        return _MISSING


def _describe(thing: Any) -> str:
    if thing is _MISSING:
        return "missing"
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    if isinstance(thing, property):
        return "property"
    if inspect.ismodule(thing):
        return "module"
    if inspect.isclass(thing):
        return f"class{_signature(thing)}"
    if callable(thing) and not isinstance(thing, type):
        return f"function{_signature(thing)}" if inspect.isroutine(thing) else type(thing).__name__
    return type(thing).__name__


def _signature(thing: Any) -> str:
    """Names and kinds of the parameters; types and default values are not what is called."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    plain = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...)
        for p in parameters
    ]
    return str(inspect.Signature(plain)).replace("Ellipsis", "...")


def _asked() -> tuple[dict[str, str], dict[str, str]]:
    """Attributes that transformers' generation and models read from a cache, and from a layer."""
    home = Path(transformers.__file__).parent
    files = [*home.glob("generation/*.py"), *home.glob("models/*/modeling_*.py")]
    files += [home / "masking_utils.py"]
    cache: dict[str, str] = {}
    layer: dict[str, str] = {}
    for path in files:
        if path.name.startswith(("modeling_tf_", "modeling_flax_")):
            continue
        text = path.read_text(encoding="utf-8")
        for pattern, names in ((_CACHE_READ, cache), (_LAYER_READ, layer)):
            for name, called in pattern.findall(text):
                if names.get(name) != "called":
                    names[name] = "called" if called else "read"
    return dict(sorted(cache.items())), dict(sorted(layer.items()))


if __name__ == "__main__":
    sys.exit(main())
