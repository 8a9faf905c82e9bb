"""The bundled model: where it lies, how it was trained, and what it recalls.

    from transformers import AutoModelForCausalLM
    from mnemon.zoo import bundled_model_path
    model = AutoModelForCausalLM.from_pretrained(bundled_model_path())

- `corpus`, `tasks`, `tokenizer`: what it is trained on
- `architecture`, `wiring`, `schedule`, `prepare`, `trainer`, `train`: how
- `prompts`, `recall`, `evaluate`, `card`: what came of it
"""

from __future__ import annotations

from pathlib import Path

from mnemon.errors import ZooError

__all__ = ["BUNDLED_MODELS", "DEFAULT_MODEL", "bundled_model_path"]

DEFAULT_MODEL = "tiny-stdlib"
BUNDLED_MODELS = (DEFAULT_MODEL,)


def bundled_model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a shipped model, as ``from_pretrained`` takes it.

    Args:
        name: one of `BUNDLED_MODELS`.

    Returns:
        The folder with ``config.json``, ``model.safetensors``, the tokenizer and the card.

    Raises:
        ZooError: no model of this name is shipped, or its files are missing.
    """
    if name not in BUNDLED_MODELS:
        raise ZooError(
            f"no bundled model is called {name!r}; shipped here: {', '.join(BUNDLED_MODELS)}"
        )
    folder = Path(__file__).parent / "models" / name
    if not (folder / "model.safetensors").is_file():
        raise ZooError(
            f"the bundled model {name!r} has no model.safetensors in this installation; "
            "reinstall mnemon, or train it with python -m mnemon.zoo.train"
        )
    return folder
