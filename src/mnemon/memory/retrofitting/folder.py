"""A trained model's folder, written whole or not at all."""

import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mnemon.errors import FileError
from mnemon.memory.retrofitting.adapter import save_retrofitted
from mnemon.memory.retrofitting.attaching import control_of

__all__ = ["write_folder"]


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write model, adapter, generation config and tokenizer under another name, then rename.

    Args:
        model: retrofitted, or a control, which gets no adapter.
        tokenizer: of the model.
        folder: not there, or empty; its parent has to be there.
        facts: how it was trained.

    Raises:
        FileError: it cannot be written; nothing is left then.
    """
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.mnemon-partial")
    try:
        if control_of(model) is None:
            model.save_pretrained(partial)
        else:
            save_retrofitted(model, partial, facts=facts)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        mode = stat.S_IMODE((partial / "config.json").stat().st_mode)
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors' own is for the owner alone
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(partial, folder)
    except OSError as error:
        raise FileError(
            f"{folder} could not be written ({error.strerror or error}); nothing was left behind: "
            f"free some space, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
