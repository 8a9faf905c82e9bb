"""Models, shapes and the comparison, the same for every peer; imports torch and transformers only.

Every peer's script calls `main` with its `export`: a function that exports one model and returns
what answers a `Call`. It runs in the peer's own environment and prints one JSON line per model.
"""

import argparse
import copy
import importlib.metadata
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

WINDOW = 6
VOCABULARY = 100
SOURCE = 6  # tokens of the encoder
TOLERANCE = 1e-4  # of max(1, |reference|)
MOST_CRASHES = 2  # of one export; the shapes after that count as refused
# What a peer is shown as a sample, where it takes one: a typical user's, all ones as the mask.
SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_QUERY = 2, 5, 3

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
_BART = {f"{side}_{name}": n for side in ("encoder", "decoder")
         for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))}  # fmt: skip

# The class without its ending, and the fields of its config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": WINDOW}),
    "Gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LLAMA
        | {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA | {"original_max_position_embeddings": 256}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        _TOKENS | {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        _TOKENS
        | {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        _TOKENS
        | _BART
        | {
            "d_model": 64,
            "max_position_embeddings": 256,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        _TOKENS
        | {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}
WINDOWED = ("Mistral", "Gemma3")


def make(name: str) -> Any:
    """A tiny model with random weights, large enough for a wrong token to show in the logits."""
    model_class, config_class, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**fields)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


@dataclass(frozen=True)
class Shape:
    """One shape of the grid."""

    batch: int
    past: int
    query: int

    def __str__(self) -> str:
        return f"batch {self.batch}, past {self.past}, query {self.query}"


def grid(name: str) -> list[Shape]:
    """Shapes that no peer has seen as a sample."""
    pasts = (0, 1, 7, 14) if name in WINDOWED else (0, 1, 7)
    return [Shape(b, p, q) for b in (1, 2, 3) for p in pasts for q in (1, 3)]


Pairs = list[tuple[Tensor, Tensor]]


@dataclass
class Call:
    """What one call of an export is fed, in every form that a peer may want.

    Args:
        model: the model in eager mode, for what the forms are made of.
        ids: [batch, past + query], of the decoder.
        mask: the same shape; first row padded on the left, unless there is an encoder.
        source_ids, source_mask: [batch, source]; the mask's first row padded at the end.
    """

    model: Any
    shape: Shape
    ids: Tensor
    mask: Tensor
    source_ids: Tensor | None = None
    source_mask: Tensor | None = None
    keeps_all: bool = False
    _encoded: Any = field(default=None, repr=False)

    @property
    def has_encoder(self) -> bool:
        return self.source_ids is not None

    @property
    def query_ids(self) -> Tensor:
        # A copy: a trace notes whether a tensor is part of another one, and refuses what is not.
        return self.ids[:, self.shape.past :].clone()

    @property
    def all_positions(self) -> Tensor:
        """As generate() makes them: padding does not count."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def positions(self) -> Tensor:
        return self.all_positions[:, self.shape.past :].clone()

    @property
    def takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @cached_property
    def encoded(self) -> Any:
        """The encoder's output."""
        with torch.no_grad():
            return self.model.get_encoder()(
                input_ids=self.source_ids, attention_mask=self.source_mask, return_dict=True
            )

    def eager(self, cache: Any, start: int, stop: int, positions: bool = True) -> Tensor:
        """The model's own logits for some of the tokens; fills the cache."""
        ids, mask = self.ids[:, start:stop], self.mask[:, :stop]
        named: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if self.has_encoder:
            named |= {"encoder_outputs": self.encoded, "attention_mask": self.source_mask}
            named |= {"decoder_input_ids": ids}
        else:
            named |= {"input_ids": ids, "attention_mask": mask}
            if positions and self.takes_positions:
                named["position_ids"] = self.all_positions[:, start:stop]
        with torch.no_grad():
            logits: Tensor = self.model(**named).logits
        return logits

    def _new(self) -> Any:
        own = DynamicCache() if self.keeps_all else DynamicCache(config=self.model.config)
        if not self.has_encoder:
            return own
        return EncoderDecoderCache(own, DynamicCache(config=self.model.config))

    def filled(self, positions: bool = True) -> Any:
        """transformers' own cache after `past` tokens; nothing in it where that is 0."""
        cache = self._new()
        if self.shape.past:
            self.eager(cache, 0, self.shape.past, positions)
        return cache

    def reference(self, positions: bool = True) -> Tensor:
        """The model's own answer."""
        past = self.shape.past
        return self.eager(self.filled(positions), past, past + self.shape.query, positions)

    def pairs(self, positions: bool = True) -> Pairs:
        """Keys and values per layer; of length 0 where there is no past."""
        if self.shape.past:
            cache = self.filled(positions)
            return layers(getattr(cache, "self_attention_cache", cache))
        # An empty cache has no tensors; those of one token, cut to none, have the right shapes.
        cache = self._new()
        self.eager(cache, 0, 1, positions)
        found = layers(getattr(cache, "self_attention_cache", cache))
        return [(keys[:, :, :0], values[:, :, :0]) for keys, values in found]

    def cross_pairs(self) -> Pairs:
        """The encoder's keys and values per layer."""
        cache = self._new()
        self.eager(cache, 0, 1)
        return layers(cache.cross_attention_cache)

    def cache(self, positions: bool = True) -> Any:
        """A cache of the class that `generate` uses, with tensors even where there is no past."""
        return put(self.model, self.pairs(positions), self.shape.past, self._cross())

    def _cross(self) -> Pairs | None:
        return self.cross_pairs() if self.has_encoder else None

    def inputs(self) -> dict[str, Any]:
        """The forward's inputs by name, all that a user might pass."""
        named: dict[str, Any] = {"past_key_values": self.cache(), "use_cache": True}
        if self.has_encoder:
            return named | {
                "attention_mask": self.source_mask,
                "decoder_input_ids": self.query_ids,
                "encoder_outputs": self.encoded,
            }
        named |= {"input_ids": self.query_ids, "attention_mask": self.mask}
        if self.takes_positions:
            named["position_ids"] = self.positions
        return named


def layers(cache: Any) -> Pairs:
    """Keys and values per layer, copied."""
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def put(model: Any, pairs: Pairs, seen: int, cross: Pairs | None = None) -> Any:
    """A DynamicCache made for the model's config, holding these tensors."""
    own = _hold(DynamicCache(config=model.config), pairs, seen)
    if cross is None:
        return own
    other = _hold(DynamicCache(config=model.config), cross, SOURCE)
    both = EncoderDecoderCache(own, other)
    both.is_updated = dict.fromkeys(range(len(cross)), True)
    return both


def _hold(cache: Any, pairs: Pairs, seen: int) -> Any:
    empty = not pairs[0][0].shape[2]
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys[:, :, :1] if not empty else keys, values[:, :, :1], index)
        layer = cache.layers[index]
        layer.keys, layer.values = keys.clone(), values.clone()
        if hasattr(layer, "cumulative_length"):
            held = layer.cumulative_length
            # An int or a tensor, by version of transformers.
            layer.cumulative_length = torch.full_like(held, seen) if torch.is_tensor(held) else seen
    return cache


def make_call(model: Any, shape: Shape, *, padded: bool = True) -> Call:
    """Random tokens for one shape."""
    total = shape.past + shape.query
    generator = torch.Generator().manual_seed(shape.batch * 1000 + shape.past * 10 + shape.query)
    ids = torch.randint(3, VOCABULARY, (shape.batch, total), generator=generator)
    call = Call(model, shape, ids, torch.ones_like(ids))
    if getattr(model.config, "is_encoder_decoder", False):
        call.source_ids = torch.randint(3, VOCABULARY, (shape.batch, SOURCE), generator=generator)
        call.source_mask = torch.ones_like(call.source_ids)
        if padded:
            call.source_mask[0, -2:] = 0
    elif padded and total > 1:
        call.mask[0, : min(2, total - 1)] = 0
    return call


def sample(model: Any) -> Call:
    """What a peer is shown that wants a sample."""
    return make_call(model, Shape(SAMPLE_BATCH, SAMPLE_PAST, SAMPLE_QUERY), padded=False)


# Answers a call with logits.
Answer = Callable[[Call], Tensor]


@dataclass
class Result:
    """An export, as a peer's script returns it.

    Args:
        answer: runs it.
        takes_positions: whether positions are an input, or made from the mask as generate() does.
            Where they are not, the model itself is not given them either.
        notes: what the peer was given.
    """

    answer: Answer
    takes_positions: bool = True
    notes: str = ""


def judge(model: Any, name: str, result: Result, shape: Shape) -> dict[str, Any]:
    """One shape: right, wrong or refused, and by how much or why.

    Models with a window are tried with both forms of the cache, what `DynamicCache(config=...)`
    keeps and every token; the better answer counts.
    """
    call = make_call(model, shape)
    reference = call.reference(result.takes_positions)
    found = _once(call, reference, result)
    if name in WINDOWED and found["status"] != "right":
        call.keeps_all = True
        again = _once(call, reference, result)
        order = ("right", "refused", "wrong")
        if order.index(again["status"]) < order.index(found["status"]):
            found = again | {"cache": "every token"}
    return found


def _once(call: Call, reference: Tensor, result: Result) -> dict[str, Any]:
    try:
        logits = result.answer(call)
    except Exception as error:
        return {"status": "refused", "why": first_line(error)}
    if logits.shape != reference.shape:
        why = f"logits of shape {list(logits.shape)} instead of {list(reference.shape)}"
        return {"status": "wrong", "why": why}
    kept = call.mask[:, call.shape.past :].bool()
    wanted, got = reference[kept], logits.detach()[kept]
    off = ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max()
    status = "right" if bool(off <= TOLERANCE) else "wrong"  # NaN is wrong
    return {"status": status, "difference": float(off) if torch.isfinite(off) else str(off.item())}


def first_line(error: BaseException) -> str:
    """The first line that says something, short, with no path in it."""
    colourless = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in colourless.splitlines()]
    text = next((line for line in lines if line), "")
    words = [Path(word).name if word.count("/") > 1 else word for word in text.split(" ")]
    return f"{type(error).__name__}: {' '.join(words)}"[:200]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in ("torch", "transformers", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(export: Callable[[Any, str, str, Path], Result], *packages: str) -> None:
    """Export models in one way and answer the grid for each, in a process of its own per model.

    The processes are forked after the imports, which take longer than most exports. A process that
    dies at a shape is a result; another one goes on with the next shape.

    Args:
        export: (model, its name, the way, a folder to write to) -> the export.
        packages: whose versions are reported.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("way")
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        row = _supervise(export, name, options.way, options.limit)
        row["versions"] = versions(*packages)
        print("@" + json.dumps({"model": name} | row), flush=True)


def _supervise(export: Any, name: str, way: str, limit_s: float) -> dict[str, Any]:
    """One model in one way: what the processes for it have said."""
    row: dict[str, Any] = {"exported": False, "seconds": None, "error": None, "notes": ""}
    shapes = grid(name)
    done: list[dict[str, Any]] = []
    crashes = 0
    while len(done) < len(shapes):
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "said.jsonl"
            ended = _child(export, name, way, Path(folder), len(done), limit_s)
            lines = said.read_text().splitlines() if said.exists() else []
        for facts in map(json.loads, lines):
            if "status" in facts:
                done.append(facts)
            else:
                row |= facts
        if not row["exported"]:
            row["error"] = row["error"] or ended
            break
        if len(done) == len(shapes):
            break
        crashes += 1
        left = shapes[len(done) :] if crashes > MOST_CRASHES else shapes[len(done) : len(done) + 1]
        done += [{"shape": str(shape), "status": "refused", "why": ended} for shape in left]
    return row | {"shapes": done, "of": len(shapes)}


def _child(export: Any, name: str, way: str, folder: Path, start: int, limit_s: float) -> str:
    """Run `_work` in a forked process; returns how that ended."""
    pid = os.fork()
    if not pid:
        try:
            _work(export, name, way, folder, start)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"the process ended with code {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"not done within {limit_s:g} s"


def _work(export: Any, name: str, way: str, folder: Path, start: int) -> None:
    with open(folder / "said.jsonl", "a") as file:

        def say(**facts: Any) -> None:
            file.write(json.dumps(facts) + "\n")
            file.flush()

        model = make(name)
        began = time.perf_counter()
        try:
            # A copy, for some peers change the model that they export.
            result = export(copy.deepcopy(model), name, way, folder)
        except Exception as error:
            traceback.print_exc()
            cause = error.__cause__
            text = first_line(error) + (f" <- {first_line(cause)}" if cause else "")
            say(error=text[:300])
            return
        say(exported=True, seconds=time.perf_counter() - began, notes=result.notes)
        for shape in grid(name)[start:]:
            say(shape=str(shape), **judge(model, name, result, shape))
