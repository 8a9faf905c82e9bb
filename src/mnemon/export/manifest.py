"""What an export's folder says about itself, and whether its files are those that were written."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mnemon.errors import ExportError
from mnemon.export.axes import Shapes
from mnemon.export.forms import CacheForm, part_names
from mnemon.export.report import Report
from mnemon.export.targets import PartInfo, target
from mnemon.files.atomic import write_atomically
from mnemon.hf.names import PreTrainedConfig
from mnemon.recipe import parse

__all__ = [
    "CONFIG",
    "MANIFEST",
    "Manifest",
    "read_config",
    "read_manifest",
    "write_manifest",
]

FORMAT = "mnemon-export"
VERSION = 2
MANIFEST = "mnemon_export.json"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an export's folder says about itself.

    Args:
        target: "program", "onnx" or "aoti".
        dtype: of the cache, e.g. "float32".
        form: the cache's form.
        shapes: every axis of every input.
        parts: the graphs.
        extras: inputs that only the samples knew, and their dtypes.
        max_tokens: tokens that there is room for: positions of the model, where it has a table of
            them, or what ``static(n)`` says.
        max_source: the same of an encoder's input.
        vocab_size: ids that the model knows.
        generation: what generating needs to know: token ids, and how tokens are drawn.
        report: what was verified.
        made_by: versions.
        files: SHA-256 of every file, by name.
    """

    target: str
    dtype: str
    form: CacheForm
    shapes: Shapes
    parts: tuple[PartInfo, ...]
    extras: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int | None = None
    max_source: int | None = None
    vocab_size: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    made_by: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "target": self.target,
            "dtype": self.dtype,
            "form": self.form.to_json(),
            "shapes": self.shapes.to_json(),
            "parts": [part.to_json() for part in self.parts],
            "extras": dict(self.extras),
            "max_tokens": self.max_tokens,
            "max_source": self.max_source,
            "vocab_size": self.vocab_size,
            "generation": dict(self.generation),
            "report": self.report.to_json(),
            "made_by": dict(self.made_by),
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Manifest":
        """The reverse of `to_json`."""
        return cls(
            target=facts["target"],
            dtype=facts["dtype"],
            form=CacheForm.from_json(facts["form"]),
            shapes=Shapes.from_json(facts["shapes"]),
            parts=tuple(PartInfo.from_json(part) for part in facts["parts"]),
            extras=dict(facts["extras"]),
            max_tokens=facts["max_tokens"],
            max_source=facts["max_source"],
            vocab_size=facts["vocab_size"],
            generation=dict(facts["generation"]),
            report=Report.from_json(facts["report"]),
            made_by=dict(facts["made_by"]),
            files=dict(facts["files"]),
        )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the digests of all files; returns it."""
    files = {
        path.name: _digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    manifest = replace(manifest, files=files)
    text = json.dumps(manifest.to_json(), indent=1).encode()
    write_atomically(folder / MANIFEST, lambda file: file.write(text))
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder and compare the digests of its files.

    Raises:
        ExportError: no export, a newer one, or files that changed since they were written.
    """
    try:
        facts = json.loads((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is no export: it has no {MANIFEST}.") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{path / MANIFEST} cannot be read: {error}.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ExportError(f"{path / MANIFEST} is not the manifest of an export.")
    if facts.get("version") != VERSION:
        raise ExportError(
            f"{path} was written in version {facts.get('version')} of the format; this mnemon "
            f"reads {VERSION}. Export again, or install the mnemon that wrote it."
        )
    try:
        manifest = Manifest.from_json(facts)
        _check_manifest(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path / MANIFEST} is damaged: {error}.") from error
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise ExportError(f"{path} lacks {name}; export again.")
        if _digest(path / name) != expected:
            raise ExportError(f"{path / name} is not what was exported: its digest differs.")
    return manifest


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's config, as transformers wrote it (infinities are objects in its JSON)."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config


def _check_manifest(manifest: Manifest) -> None:
    """Every file that will be opened is one of the folder's own, with a digest."""
    target(manifest.target)
    if not isinstance(getattr(torch, manifest.dtype, None), torch.dtype):
        raise ValueError(f"dtype {manifest.dtype!r}")
    if {part.name for part in manifest.parts} - {"encoder", "decoder"}:
        raise ValueError("a part of another name than encoder or decoder")
    outside = [name for name in manifest.files if Path(name).name != name]
    if outside:
        raise ValueError(f"{outside[0]!r} is outside its folder")
    ending = ".onnx" if manifest.target == "onnx" else ".pt2"
    needed = [CONFIG, *(f"{part.name}{ending}" for part in manifest.parts)]
    if manifest.target == "onnx":
        needed += [f"{part.name}.onnx.data" for part in manifest.parts]
    for number in (manifest.max_tokens, manifest.max_source, manifest.vocab_size):
        if number is not None and (not isinstance(number, int) or number < 0):
            raise ValueError(f"a size is {number!r}")
    _check_parts(manifest)
    lacking = [name for name in needed if name not in manifest.files]
    if lacking or not manifest.parts:
        raise ValueError(f"no digest of {', '.join(lacking) or 'any part'}")


def _check_parts(manifest: Manifest) -> None:
    """Inputs and outputs are those of the form, in its order, with its axes."""
    form, axes = manifest.form, {}
    for axis in manifest.shapes.axes:
        sizes = [axis.dim, axis.low, *(one for one in (axis.size, axis.high) if one is not None)]
        if any(not isinstance(one, int) or one < 0 for one in sizes):
            raise ValueError(f"an axis of {axis.tensor!r} has sizes {sizes}")
        axes[axis.tensor, axis.dim] = axis
    for slot in (*form.own_slots, *form.cross_slots):
        for dim, wanted in enumerate(slot.axes):
            known = axes.get((slot.name, dim))
            found = None if known is None else known.size if isinstance(wanted, int) else known.role
            if found != wanted:
                raise ValueError(f"{slot.name}[{dim}] is {found!r} instead of {wanted!r}")
    recipe = parse(form.recipe)
    kinds = {part.kind for layer in form.layers for part in layer}
    if (recipe.static_tokens is not None) != ("static" in kinds) or (recipe.packed is not None) != (
        "packed" in kinds
    ):
        raise ValueError(f"the recipe {form.recipe!r} with layers of the kinds {sorted(kinds)}")
    for part in manifest.parts:
        inputs, outputs = part_names(form, part.name, tuple(manifest.extras))
        if part.inputs != inputs or part.outputs != outputs:
            raise ValueError(f"inputs or outputs of the {part.name} are not those of its cache")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
