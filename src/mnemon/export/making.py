"""`export_model`: guess, trace, build, verify."""

import copy
import importlib.metadata
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from mnemon.errors import ExportError
from mnemon.export.axes import Ranges
from mnemon.export.exported import Exported
from mnemon.export.forms import CacheForm, form_supports
from mnemon.export.manifest import CONFIG, Manifest, write_manifest
from mnemon.export.targets import target
from mnemon.export.tracing import plan_shapes, read_form, trace
from mnemon.export.verify import TIMEOUT_S
from mnemon.export.verify import verify as compare
from mnemon.hf.exporting import num_positions, vocabulary_size

__all__ = ["export_model"]

Sample = Mapping[str, Any]
_PACKAGES = ("mnemon", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_GENERATION = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
)
_PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
_ONE_AT_A_TIME = threading.RLock()  # modules change their mode, torch's output is caught

# Options of a generation config that change no token, or are arguments of a runner.
_HARMLESS = frozenset(
    (
        *_GENERATION,
        "_from_model_config",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_length",
        "max_new_tokens",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "transformers_version",
        "use_cache",
    )
)


def export_model(
    model: PreTrainedModel,
    samples: Sample | Sequence[Sample] | None = None,
    to: str = "program",
    cache: Any = None,
    ranges: Ranges | None = None,
    verify: bool = True,
    *,
    opset: int | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> Exported:
    """Export a model that generates text, with a cache whose lengths stay free.

    Which axes are free is known from what the inputs are for; samples confirm it and say what the
    axes of further inputs are. The graph is traced on inputs made for that (every free axis
    distinct and at least 2, padded), never on the samples, and then compared with the model on a
    grid of shapes, in a process of its own.

    Args:
        model: a causal LM or an encoder-decoder model, on the CPU.
        samples: inputs by name (``input_ids``, ``attention_mask``, ``past_key_values`` and what
            else the forward takes), one or several sets of them; None: the config says it all.
        to: "program" (``torch.export``), "onnx" or "aoti" (AOTInductor, for this processor).
        cache: how the graph keeps its cache: "" or None grows; "static(n)" lies in the graph's own
            memory, with room for n tokens of a fixed batch (`ranges={"batch": 4}`; 1 if unsaid);
            "int8", "int4", "int2", "fp8" and pairs are kept in few bits between two calls. A
            cache, or a class of caches, stands for its recipe.
        ranges: pins or bounds axes: ``{"batch": 1, "past": (0, 4096)}``; ``"input_ids[0]"`` works,
            too.
        verify: compare with the model; a wrong number is then an error, a refused shape is listed.
        opset: of ONNX; the exporter's own if None.
        timeout_s: for the comparison.
        progress: called with what is being done and the units of it just finished.

    Returns:
        The export, in a temporary folder until `Exported.save`.

    Raises:
        ExportError: samples that contradict themselves, a model that cannot be traced with free
            lengths, or an export that gives other numbers than the model.
        DependencyError: a package that the target needs is missing.
    """
    given = [] if samples is None else [samples] if isinstance(samples, Mapping) else list(samples)
    kind = target(to)
    if opset is not None and to != "onnx":
        raise ExportError(f"opset is of ONNX; to={to!r} has none.")
    recipe = form_supports(cache)
    kind.check(model.dtype)
    kind.check_recipe(recipe)
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ExportError('The model is not on the CPU; move it there first: model.to("cpu").')
    _ONE_AT_A_TIME.acquire()
    modes = [(module, module.training) for module in model.modules()]
    folder = Path(tempfile.mkdtemp(prefix="mnemon-export-"))
    try:
        model.eval()
        try:
            model.config.to_json_file(str(folder / CONFIG), use_diff=False)
        except TypeError as error:
            raise ExportError(f"The model's config cannot be written as JSON: {error}.") from error
        progress("read what the model keeps", 0)
        form = read_form(model, recipe)
        shapes, extras = plan_shapes(model, form, given, ranges)
        progress("trace", 1)
        plain = kind.plain_operators
        with kind.tracing(model.dtype):
            parts = trace(model, form, shapes, extras, given, plain_operators=plain)
        for part in parts:
            progress(f"build {part.info.name} for {to}", 1)
            shapes = shapes.bounded(part.highs)
            kind.build(part.program, part.info, folder, opset=opset, symbols=part.symbols)
        manifest = Manifest(
            target=to,
            dtype=str(model.dtype).removeprefix("torch."),
            form=form,
            shapes=shapes,
            parts=tuple(part.info for part in parts),
            extras={name: str(given[0][name].dtype).removeprefix("torch.") for name in extras},
            max_tokens=min(
                (one for one in (_positions(model, form), form.room) if one is not None),
                default=None,
            ),
            max_source=num_positions(model.get_encoder()) if form.has_cross else None,
            vocab_size=vocabulary_size(model),
            generation=_generation(model),
            made_by=_versions(),
        )
        manifest = write_manifest(folder, manifest)
        exported = Exported(folder, manifest, is_temporary=True)
        exported.config = copy.deepcopy(model.config)  # also of a type that nobody registered
        if verify:
            progress("compare with the model", 1)
            report = compare(model, exported, timeout_s=timeout_s, progress=progress)
            exported.manifest = write_manifest(folder, replace(manifest, report=report))
            if report.wrong:
                raise ExportError(f"The export does not give the model's numbers.\n{report}")
            if not report.num_right:
                raise ExportError(
                    f"The export ran on no shape, so nothing is known of its numbers (verify=False "
                    f"exports without asking).\n{report}"
                )
        return exported
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        for module, was_training in modes:
            module.training = was_training
        _ONE_AT_A_TIME.release()


def _positions(model: PreTrainedModel, form: CacheForm) -> int | None:
    return num_positions(model.get_decoder() if form.has_cross else model)


def _generation(model: PreTrainedModel) -> dict[str, Any]:
    config = getattr(model, "generation_config", None) or GenerationConfig()
    found = {name: getattr(config, name, None) for name in _GENERATION}
    if found["decoder_start_token_id"] is None and model.config.is_encoder_decoder:
        found["decoder_start_token_id"] = getattr(model.config, "decoder_start_token_id", None)
    served = {name: value for name, value in found.items() if value is not None}
    others = sorted(
        name
        for name, value in config.to_diff_dict().items()
        if name not in _HARMLESS and value not in (None, False, [], {}, _PLAIN.get(name))
    )
    return served | ({"not_served": others} if others else {})


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
