"""Find and load the model a command was asked for: bundled, local, or from the Hub.

Nothing here imports torch or transformers until `load_model` runs, so `mnemon plan` stays instant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mnemon.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_NAME = "tiny-stdlib"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_SHORT_NAMES = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPE_SHORT_NAMES |= {"f16": "float16", "half": "float16", "float": "float32"}


class LoadedModel(NamedTuple):
    """A model ready to run, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path | None  # the folder it was read from; None when the Hub client manages it


class ModelSource(NamedTuple):
    """Where a model lies, before anything of it is read."""

    name: str
    path: Path | None  # a folder with a config.json, or None: not on this machine yet
    reference: str  # for from_pretrained: a folder, or a Hub name (a snapshot may be partial)


def resolve(name: str | None) -> ModelSource:
    """Say where the model `name` lies, without loading it.

    Args:
        name: None, "" or "tiny-stdlib" for the bundled model; a folder; a Hub name "org/model".

    Returns:
        Its name and folder; the folder is None for a Hub name that was never downloaded.

    Raises:
        ModelError: a folder without `config.json`, a path that does not exist, or a malformed name.
    """
    if not name or name == BUNDLED_NAME:
        from mnemon.zoo import bundled_model_path

        path = Path(bundled_model_path())
        return ModelSource(BUNDLED_NAME, path, str(path))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name!r} is a folder without a config.json; "
                "pass the folder that save_pretrained wrote, or a Hub name like 'org/model'."
            )
        return ModelSource(folder.resolve().name, folder, str(folder))
    if folder.is_file():
        raise ModelError(
            f"{name!r} is a file; a model is a folder with a config.json, or a Hub name. "
            "For a saved cache use `mnemon inspect`."
        )
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.strip("/") != name:
        raise ModelError(
            f"there is no folder {name!r}; pass a folder with a config.json, "
            f"a Hub name like 'org/model', or {BUNDLED_NAME!r} for the bundled model."
        )
    return ModelSource(name, _hub_snapshot(name), name)


def read_config(name: str | None) -> tuple[dict[str, Any], ModelSource]:
    """Read the config.json of the model `name`, from disk or (once) from the Hub.

    Returns:
        The config as plain data, and where the model lies.

    Raises:
        ModelError: no such model, or a config.json that is not a JSON object.
    """
    source = resolve(name)
    path = source.path / "config.json" if source.path else _download_config(source.name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; fetch it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; a config is a JSON object.")
    return config, source


def load_model(
    name: str | None, *, dtype: str = "auto", device: str = "auto", with_tokenizer: bool = True
) -> LoadedModel:
    """Load a model and its tokenizer, in evaluation mode.

    Args:
        name: None, "" or "tiny-stdlib" for the bundled model; a folder; a Hub name "org/model".
        dtype: "auto" (as the weights were saved), "float32", "bfloat16" or "float16".
        device: "auto" (an accelerator when there is one, else the CPU) or a torch device.
        with_tokenizer: False for what needs no text; the tokenizer is then None.

    Raises:
        ModelError: it is not there, cannot be loaded, or generates no text.
    """
    source = resolve(name)
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    from transformers import AutoConfig, AutoTokenizer

    from mnemon.hf.streaming import disable_progress_bar

    disable_progress_bar()  # the command draws its own
    where = source.reference
    try:
        config = AutoConfig.from_pretrained(where)
        model, found = _auto_class(config, source.name).from_pretrained(
            where, dtype=torch_dtype, output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:  # a damaged folder raises whatever its reader happens to trip over
        raise ModelError(_why_not_loaded(source, error)) from error
    if missing := sorted(found["missing_keys"]):
        # transformers fills them with random numbers: fluent nonsense, without an error.
        raise ModelError(
            f"{source.name} has no weights for {len(missing)} parameters of a "
            f"{config.model_type!r} model, {missing[0]!r} among them; config.json and the weights "
            "do not belong together."
        )
    tokenizer = None
    try:
        if with_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {source.name} cannot be loaded: {_first_line(error)}; "
            "a model's folder needs what tokenizer.save_pretrained(folder) writes."
        ) from error
    try:
        model = model.to(torch_device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{source.name} does not go to device {device!r}: {_first_line(error)}; "
            "try --device cpu, or a smaller --dtype."
        ) from error
    # Who wants none does not look at it.
    return LoadedModel(model.eval(), cast(Any, tokenizer), source.name, source.path)


def parse_dtype(text: str) -> Any:
    """Turn a dtype name into what `from_pretrained(dtype=...)` takes: "auto" or a torch dtype.

    Raises:
        ModelError: not a floating dtype that models run in.
    """
    name = DTYPE_SHORT_NAMES.get(text, text)
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {text!r}; valid are {', '.join(DTYPES)}.")
    if name == "auto":
        return name
    import torch

    return getattr(torch, name)


def parse_device(text: str) -> Any:
    import torch

    if text == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # it holds no numbers
        raise ModelError(f"unknown device {text!r}; use auto, cpu, cuda, cuda:1, mps or xpu.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(
            f"device {text!r} is not there, or not for this torch; use auto."
        ) from None
    return device


def _auto_class(config: Any, name: str) -> Any:
    """The auto class that gives this config a head which generates text."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )
    from transformers.models.auto import modeling_auto as auto

    remote = getattr(config, "auto_map", None) or {}
    for auto_class, mapping in (
        (AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        (AutoModelForSpeechSeq2Seq, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING),
        (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        # BART and its kin are in both tables: is_encoder_decoder says which head the weights have.
        fits = "Seq2Seq" not in auto_class.__name__ or config.is_encoder_decoder
        if (type(config) in mapping and fits) or auto_class.__name__ in remote:
            return auto_class
    raise ModelError(
        f"{name} is a {config.model_type!r} model, which generates no text; "
        "pass a causal, sequence-to-sequence or image-text model."
    )


def _hub_snapshot(name: str) -> Path | None:
    """The newest downloaded snapshot of a Hub model, read from the Hub client's folder layout."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    repository = Path(cache or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


def _download_config(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the client raises a dozen unrelated types for "not reachable"
        raise ModelError(_why_not_loaded(ModelSource(name, None, name), error)) from error


def _why_not_loaded(source: ModelSource, error: BaseException) -> str:
    if source.path is None:
        return (
            f"{source.name!r} is not a folder here and could not be fetched from the Hub: "
            f"{_first_line(error)}; check the name and the network, "
            f"or use {BUNDLED_NAME!r}, the bundled model."
        )
    return f"{source.name} in {source.path} cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
