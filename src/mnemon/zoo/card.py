"""Write a model card from what was recorded in training and measured after it.

``python -m mnemon.zoo.card --model DIR`` reads ``training.json`` and ``eval.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mnemon.errors import ZooError

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small Llama trained to recall, so that what a KV cache forgets shows. It is an instrument
for measuring caches, not an assistant: its text reads like Python without meaning much.

| | |
|---|---|
| architecture | Llama, {layers} layers, {hidden} wide, {heads} query and {kv_heads} KV heads \
of {head_dim}, tied embedding |
| parameters | {parameters:,} |
| tokenizer | byte-level BPE, {vocab:,} tokens, learnt from the training documents |
| context | {context:,} tokens, RoPE base {theta:,.0f} |
| weights | bfloat16, {megabytes:.1f} MB, SHA-256 `{sha}` |
| KV cache | {kv_bytes:,} bytes per token in float32 |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from mnemon.zoo import bundled_model_path

model = AutoModelForCausalLM.from_pretrained(bundled_model_path())
tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
```

## Recall accuracy by distance

Exact match of a two-token answer, decoded greedily; the distance is tokens from an answer's
token back to its source. `needle`: a planted line among held-out text and other such lines.
`pairs`: random two-word keys with two-word values, no text. Chance is {chance:.1e}. In
brackets the 95% Wilson interval; {samples} prompts per cell of `needle`, {pairs_samples} of
`pairs`; weights and arithmetic in {dtype}.

| distance | needle | pairs |
|---:|---|---|
{curve}

{aim}

## Held-out bits per byte

{bits}

Held out are {held_out} of {documents} documents ({held_out_bytes:,} bytes), chosen by the SHA-256
of their names; neither the tokenizer nor the training saw them.

## Data

The standard library of Python {python}: its sources (without tests and code page tables), pydoc's
copy of the language reference, and the docstrings of the modules written in C:
{train_bytes:,} bytes, {train_tokens:,} tokens of training text. Names' SHA-256
`{names_sha}`, texts' SHA-256 `{text_sha}`. Another Python version gives other text, and
figures a little different. Mixed with it: generated recall rows (random chunks repeated in
another order; lines planted in the text and asked for later), fresh at every step.

## Training

{steps:,} steps, {tokens:,} tokens, {minutes} minutes on {hardware}; Muon for the
matrices (rate {matrix_lr}), AdamW for the rest (rate {other_lr}); rows of 256 tokens at first,
then up to {longest:,}.

{init}

Reproduce: `{command}`. A step's rows depend
on the seed and the step alone, but the run was bounded by wall clock, was interrupted and
resumed, and moved to longer rows by accuracy and time spent: the same command gives a like
model, not the same bits.

Measured on {date} with torch {torch}, transformers {transformers}: `{eval_command}`
(figures in `eval.json`, training record in `training.json`).

## Limits

It knows one library's text and three recall formats. The accuracy above is for these formats
at these distances, within {context:,} tokens; beyond that nothing was trained or measured. The
chat template only lays out messages: the model does not follow instructions.

## Licence

Weights and code: Apache-2.0. The training text is Python's standard library and
documentation, under the PSF licence; none of it is shipped here.
"""

_WIRED = """\
**The starting weights are not all random.** Two layers begin as an induction circuit
(`mnemon/zoo/wiring.py`): from random weights, a model of this size had learnt next to no
copying after several million tokens, more than this run could spend. Before any training that
circuit already gives most recalled tokens (`tests/zoo/test_wiring.py` holds it to that) and
predicts text hardly better than chance; training taught the model text, and to recall with text
around. Its recall is real attention over the KV cache; how recall emerges it cannot tell."""
_PLAIN = "The starting weights were random."


def _cell(point: dict[str, Any]) -> str:
    return f"{point['accuracy']:.1%} [{point['low']:.1%}, {point['high']:.1%}]"


def write_card(folder: Path) -> Path:
    """Write ``README.md`` into a model's folder.

    Args:
        folder: holds ``config.json``, ``training.json`` and ``eval.json``.

    Returns:
        The card's path.

    Raises:
        ZooError: a record is missing.
    """
    records = {}
    for name in ("config", "training", "eval"):
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ZooError(f"a card needs {name}.json in {folder.name!r}; train and evaluate first")
        records[name] = json.loads(path.read_text())
    config, training, measured = records["config"], records["training"], records["eval"]
    needle, pairs = measured["recall"]["needle"], measured["recall"]["pairs"]
    within = [point for point in needle if point["distance"] <= 2048]
    worst = min(within, key=lambda point: point["accuracy"])
    verdict = "reached" if worst["accuracy"] >= 0.9 else "**not reached**"
    trained_on = training["corpus"]
    text = _CARD.format(
        name=folder.name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        theta=config["rope_theta"],
        parameters=measured["num_parameters"],
        megabytes=measured["weights_bytes"] / 1e6,
        sha=measured["weights_sha256"],
        kv_bytes=2
        * 4
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * config["head_dim"],
        chance=measured["chance"],
        samples=needle[0]["samples"],
        pairs_samples=pairs[0]["samples"],
        dtype=measured["dtype"],
        curve="\n".join(
            f"| {a['distance']:,} | {_cell(a)} | {_cell(b)} |"
            for a, b in zip(needle, pairs, strict=True)
        ),
        aim=(
            f"The aim, 90% of needles out to 2,048 tokens, is {verdict}: the lowest there is "
            f"{worst['accuracy']:.1%}, at {worst['distance']:,}."
        ),
        bits="\n".join(
            f"- windows of {int(context):,} tokens: **{value['bits_per_byte']:.3f}** "
            f"({value['num_bytes']:,} bytes, {value['num_tokens']:,} tokens)"
            for context, value in measured["bits_per_byte"].items()
        ),
        held_out=trained_on["num_held_out"],
        documents=trained_on["num_documents"],
        held_out_bytes=trained_on["held_out_bytes"],
        python=trained_on["python_version"],
        train_bytes=trained_on["train_bytes"],
        train_tokens=trained_on["train_tokens"],
        names_sha=trained_on["names_sha256"],
        text_sha=trained_on["text_sha256"],
        steps=training["steps"],
        tokens=training["tokens"],
        minutes=training["minutes"],
        hardware=training["hardware"],
        longest=training["longest_row"],
        matrix_lr=training["matrix_lr"],
        other_lr=training["other_lr"],
        init=_WIRED if training["init"] == "wired" else _PLAIN,
        command=training["command"],
        date=measured["date"],
        torch=measured["versions"]["torch"],
        transformers=measured["versions"]["transformers"],
        eval_command=measured["command"],
    )
    path = folder / "README.md"
    path.write_text(text)
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mnemon.zoo.card", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    write_card(parser.parse_args(arguments).model)


if __name__ == "__main__":
    main()
