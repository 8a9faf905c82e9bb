"""The child process of `verify`: runs an export on prepared cases, one line of JSON per case.

python -m mnemon.export.worker EXPORT CASES BEGIN
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mnemon.export.exported import Exported, in_one_piece, load_export
from mnemon.export.kinds.base import distance
from mnemon.export.report import Case

__all__ = ["main"]


def main() -> None:
    """Answer all cases from the one at index BEGIN on."""
    folder, path, begin = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    exported = load_export(folder)
    exported.sessions  # noqa: B018  # loads them
    print(json.dumps({"loaded": True}), flush=True)
    cases = [Case(**facts) for facts in json.loads((path / "cases.json").read_text("utf-8"))]
    for index in range(begin, len(cases)):
        try:
            found = answer(exported, load_file(path / f"{index}.safetensors"), cases[index])
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            text = f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
            found = {"error": text}
        print(json.dumps(found), flush=True)


def answer(exported: Exported, tensors: dict[str, Tensor], case: Case) -> dict[str, object]:
    """Run one case; how far logits and cache are off."""
    form = exported.form
    past: list[Any] = []
    if case.made_by == "export" or not case.past:
        past = list(form.empty(case.batch, exported.dtype, "cpu"))
    else:
        past = [tensors[f"past.{slot.name}"] for slot in form.own_slots]
    if case.strided:  # as a cache with reserve has them: heads far apart
        wide = [torch.nn.functional.pad(one, (0, 1), value=7.0) for one in past]
        past = [one[..., :-1] for one in wide]
    past = [in_one_piece(one) for one in past]
    cross: list[Any] = []
    source_mask = None
    if form.has_cross:
        source_mask = tensors["source_mask"]
        cross = list(exported.encode(tensors["source_ids"], source_mask))
    shown = [exported.sessions["encoder"].tensor(one) for one in cross]
    extras = [tensors[f"extra.{name}"] for name in exported.manifest.extras]
    session = exported.sessions["decoder"]

    def call(start: int, stop: int) -> Tensor:
        ids, mask = tensors["input_ids"][:, start:stop], tensors["attention_mask"][:, :stop]
        others = [
            one[:, start:stop] if name == "position_ids" else one
            for name, one in zip(exported.manifest.extras, extras, strict=True)
        ]
        inputs = [session.tensor(one) for one in past]
        first = stop if not form.takes_one_token else start + 1
        exported.check(ids[:, : first - start], mask[:, :first], inputs, shown, source_mask, others)
        logits, past[:] = exported.feed(ids, mask, past, cross, source_mask, others)
        return logits

    if case.made_by == "export" and case.past:
        stride = case.query if _is_pinned(exported) and not form.takes_one_token else case.past
        for start in range(0, case.past, stride):
            call(start, start + stride)
    starts = range(case.past, tensors["input_ids"].shape[1], case.query)
    logits = torch.cat([call(start, start + case.query) for start in starts], dim=1)
    found = [session.tensor(one) for one in past]
    expected = [tensors[f"held.{slot.name}"] for slot in form.own_slots if not form.is_static]
    shapes = [
        f"{slot.output} is {list(one.shape)} instead of {list(other.shape)}"
        for slot, one, other in zip(form.own_slots, found, expected, strict=True)
        if one.shape != other.shape
    ]
    if shapes:
        return {"logits": float("nan"), "cache": float("nan"), "shapes": shapes[0]}
    apart = 0.0
    if case.made_by != "export":  # else what was padding may differ, which nothing reads
        pairs = zip(form.grouped(found), form.grouped(expected), strict=True)
        apart = max(
            (part.difference(one, other) for (_, part, one), (*_, other) in pairs), default=0.0
        )
    return {"logits": distance(logits, tensors["logits"]), "cache": apart}


def _is_pinned(exported: Exported) -> bool:
    return "query" not in exported.shapes.symbols


if __name__ == "__main__":
    main()
