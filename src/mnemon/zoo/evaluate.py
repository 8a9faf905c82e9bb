"""Measure a trained model and write its ``eval.json`` and card.

``python -m mnemon.zoo.evaluate --model DIR`` takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from mnemon.errors import ZooError
from mnemon.zoo import corpus
from mnemon.zoo.card import write_card
from mnemon.zoo.prompts import TASKS
from mnemon.zoo.recall import DISTANCES, bits_per_byte, recall_by_distance
from mnemon.zoo.tokenizer import word_ids

CONTEXTS = (1024, 4096)


def evaluate(
    folder: Path,
    *,
    samples: int = 100,
    pairs_samples: int | None = None,
    text_bytes: int | None = None,
    dtype: str = "float32",
    command: str = "",
) -> dict[str, Any]:
    """Measure recall by distance and held-out bits per byte.

    Args:
        folder: the model's folder.
        samples: prompts per task and distance.
        pairs_samples: prompts per distance of the ``pairs`` task; ``samples`` when None.
        text_bytes: measure bits per byte on the first so many held-out bytes; all when None.
        dtype: the dtype the weights are run in.
        command: what was typed, to be recorded.

    Returns:
        The content of ``eval.json``.

    Raises:
        ZooError: the folder holds no model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mnemon.hf.names import attention_implementation

    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ZooError(f"no model.safetensors in {str(folder)!r}; train one first")
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.train(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = corpus.load_documents()
    _, held_out = corpus.split(documents)
    texts, room = [], float("inf") if text_bytes is None else text_bytes
    for document in held_out:
        if len(document.text.encode()) <= room:
            texts.append(document.text)
            room -= len(document.text.encode())
    recall = {
        task: [
            point._asdict() | {"accuracy": round(point.accuracy, 4)}
            for point in recall_by_distance(
                model,
                tokenizer,
                distances=DISTANCES,
                samples=pairs_samples if pairs_samples and task == "pairs" else samples,
                task=task,
            )
        ]
        for task in TASKS
    }
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": command,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_bytes": weights.stat().st_size,
        "num_parameters": model.num_parameters(),
        "dtype": dtype,
        "attention": attention_implementation(model.config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "corpus": corpus.summarise(documents)._asdict(),
        "chance": 1 / len(word_ids(tokenizer)) ** 2,
        "recall": recall,
        "bits_per_byte": {
            str(context): bits_per_byte(model, tokenizer, texts, context=context)._asdict()
            for context in CONTEXTS
        },
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mnemon.zoo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--pairs-samples", type=int)
    parser.add_argument("--text-bytes", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(arguments)
    typed = " ".join(sys.argv[1:] if arguments is None else arguments)
    measured = evaluate(
        given.model,
        samples=given.samples,
        pairs_samples=given.pairs_samples,
        text_bytes=given.text_bytes,
        dtype=given.dtype,
        command=f"python -m mnemon.zoo.evaluate {typed.replace(str(given.model), 'DIR')}",
    )
    (given.model / "eval.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(write_card(given.model).read_text())


if __name__ == "__main__":
    main()
