"""Write src/mnemon/planner/defaults.json from transformers' config classes.

    python -m tests.planner_defaults

A config.json leaves out what its class has a default for; the planner must not import the class.
`tests/test_planner.py` fails when the file and the installed transformers disagree.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mnemon.planner
from mnemon.planner.families import COMPOSITES, MODEL_TYPES
from mnemon.planner.settings import FIELDS

PATH = Path(mnemon.planner.__file__).with_name("defaults.json")


def plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def entry(model_type: str) -> dict[str, Any]:
    config_class = CONFIG_MAPPING[model_type]
    names = {
        common: actual
        for common, actual in getattr(config_class, "attribute_map", {}).items()
        if common in FIELDS
    }
    wanted = set(FIELDS) | set(names.values())
    defaults = {}
    for field in dataclasses.fields(config_class):
        value = field.default
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        value = list(value) if isinstance(value, tuple) else value
        if field.name in wanted and value is not dataclasses.MISSING and plain(value):
            defaults[field.name] = value
    return {"names": names, "defaults": defaults}


def table() -> dict[str, Any]:
    entries = {name: entry(name) for name in sorted(MODEL_TYPES)}
    for name, section in COMPOSITES.items():
        entries[name] = {"text": list(section), "names": {}, "defaults": {}}
    return entries


if __name__ == "__main__":
    rows = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table().items()]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"{PATH.name}: {len(rows)} model types")
