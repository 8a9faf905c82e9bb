"""What the old models say, recorded under the releases that run them without help.

    HF_HUB_OFFLINE=1 .venv-4.57/bin/python -m tests.legacy.record

adds the answers of the running release to ``recorded.json``; other releases' answers stay. A
release older than 4.45 runs beside a current torch when its wheel (with tokenizers 0.19.1 and
huggingface_hub 0.24.7) is unpacked into a folder named first in PYTHONPATH. ``--check`` compares
instead of writing.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded.json"
NEW_TOKENS = 12

__all__ = ["NEW_TOKENS", "RECORDED", "answers", "inputs", "modes", "sink_answer"]


def modes(style: str) -> dict[str, dict[str, Any]]:
    """Arguments of `generate` for each way of decoding that `style` is asked for."""
    found: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "top_k": 8},
    }
    if style not in {"crop_lookback"}:
        found["beams"] = {"do_sample": False, "num_beams": 3}
    return found


def inputs(style: str, *, padded: bool) -> dict[str, Any]:
    """The prompt: one row of seven tokens, or two rows of which the second is padded left."""
    import torch

    ids = torch.tensor([[1, 11, 23, 35, 47, 59, 8]])
    if style == "got_ocr":
        ids[0, 1:5] = 3  # where the picture goes
    mask = torch.ones_like(ids)
    if padded:
        second = torch.tensor([[0, 0, 1, 19, 42, 7, 33]])
        if style == "got_ocr":
            second = torch.tensor([[0, 1, 3, 3, 3, 3, 33]])
        if style == "bart_four":
            second = torch.tensor([[1, 19, 42, 7, 33, 0, 0]])  # encoders are padded on the right
        ids = torch.cat([ids, second])
        mask = (ids != 0).long()
    given = {"input_ids": ids, "attention_mask": mask}
    if style == "got_ocr":
        given["images"] = torch.linspace(-1, 1, 24 * len(ids)).view(len(ids), 4, 6)
    return given


def answers(model: Any, style: str, **extra: Any) -> dict[str, Any]:
    """The tokens (of `sundial`: the rounded forecast) of every mode."""
    import torch

    if style == "sundial":
        series = torch.sin(torch.arange(24.0)).view(1, -1)
        return {"forecast": [round(x, 4) for x in model.forecast(series, 5, **extra)[0].tolist()]}
    found = {}
    for mode, arguments in modes(style).items():
        for padded in (False, True):
            torch.manual_seed(0)
            tokens = model.generate(
                **inputs(style, padded=padded),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
                **arguments,
                **extra,
            )
            found[f"{mode}{' padded' if padded else ''}"] = tokens.tolist()
    return found


def sink_answer(model: Any, cache: Any) -> list[list[int]]:
    """What `phi3` says with a `SinkCache` of ten tokens, well beyond them."""
    tokens: list[list[int]] = model.generate(
        **inputs("phi3", padded=False),
        past_key_values=cache,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    ).tolist()
    return tokens


def main() -> None:
    import torch
    import transformers

    from .building import STYLES, build, load

    torch.set_num_threads(1)
    version = transformers.__version__
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    mine: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for style, spec in STYLES.items():
            try:
                model = load(build(style, Path(folder)), spec.auto_class)
                mine[style] = answers(model, style)
                if style == "phi3":
                    from transformers.cache_utils import SinkCache

                    mine[style]["sinks"] = sink_answer(model, SinkCache(10, 2))
            except Exception as error:
                if spec.native == version:
                    raise
                print(f"{style}: {type(error).__name__}: {error}", file=sys.stderr)
    if "--check" in sys.argv:
        if mine != recorded.get(version):
            sys.exit(f"{version} says something else than what was recorded")
        return
    recorded[version] = mine
    RECORDED.write_text(json.dumps(recorded, sort_keys=True).replace('}, "', '},\n "') + "\n")
    print(f"{version}: {len(mine)} of {len(STYLES)} styles run without help")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as modules:
        os.environ.setdefault("HF_MODULES_CACHE", modules)
        main()
