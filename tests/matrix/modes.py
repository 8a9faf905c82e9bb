"""The columns of the matrix: every way `generate` reads and writes a cache.

A mode takes a tiny model, a function that makes an empty cache (None: transformers makes its own)
and returns the tokens. The reference and the candidate run the very same code, so that the cache is
all they differ in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from .builders import Inputs, MakeInputs, perturbed, token_ids

PROMPT = 20
NUM_NEW = 12
PADDING = 9
NUM_PER_TURN = 7
#: An end of text outside every vocabulary: prompt lookup in 4.57 raises without one.
NEVER_SAID = 1_000_000

#: Makes an empty cache for a model and a recipe; None as a result lets transformers make its own.
MakeCache = Callable[[Any, str], Any]
Mode = Callable[["Bench", MakeCache], Tensor]


class Bench:
    """A tiny model with what the modes need around it; built once per row."""

    def __init__(self, model: Any, make_inputs: MakeInputs) -> None:
        self.model = model
        self.make_inputs = make_inputs
        self._assistant: Any = None
        self._use_cache = True

    @property
    def assistant(self) -> Any:
        """A draft model that agrees with this one on some tokens and not on others."""
        if self._assistant is None:
            self._assistant = perturbed(self.model)
        return self._assistant

    @property
    def cache_name(self) -> str:
        """transformers calls the argument `cache_params` for every class named after Mamba."""
        return "cache_params" if "mamba" in type(self.model).__name__.lower() else "past_key_values"

    def without_cache(self) -> Bench:
        """The same model, computing every token again."""
        other = copy.copy(self)
        other._use_cache = False
        return other

    def generate(self, inputs: Inputs, cache: Any, num_new: int = NUM_NEW, **kwargs: Any) -> Tensor:
        """Tokens [batch, tokens], generated without randomness unless `kwargs` ask for it."""
        if cache is not None:
            kwargs[self.cache_name] = cache
        kwargs.setdefault("do_sample", False)
        if not self._use_cache:
            kwargs["use_cache"] = False
        return self.model.generate(**inputs, max_new_tokens=num_new, **kwargs)  # type: ignore[no-any-return]


def default_cache(model: Any, recipe: str) -> None:
    """Reference: `generate` makes the cache."""
    return None


def dynamic_cache(model: Any, recipe: str) -> Any:
    """Reference where one cache serves several calls: what `generate` would have made."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=config))
    return cache


def mnemon_cache(model: Any, recipe: str) -> Any:
    """Candidate."""
    import mnemon

    return mnemon.Cache(model.config, recipe)


def greedy(bench: Bench, cache: MakeCache) -> Tensor:
    return bench.generate(bench.make_inputs(1, PROMPT), cache(bench.model, ""))


def sampling(bench: Bench, cache: MakeCache) -> Tensor:
    torch.manual_seed(1)
    inputs = bench.make_inputs(2, PROMPT)
    return bench.generate(inputs, cache(bench.model, ""), do_sample=True, temperature=0.8, top_k=0)


def sampling_returns(bench: Bench, cache: MakeCache) -> Tensor:
    torch.manual_seed(2)
    inputs = bench.make_inputs(2, PROMPT)
    return bench.generate(
        inputs, cache(bench.model, ""), do_sample=True, top_k=20, num_return_sequences=3
    )


def beams(bench: Bench, cache: MakeCache) -> Tensor:
    return bench.generate(bench.make_inputs(2, PROMPT), cache(bench.model, ""), num_beams=3)


def beam_returns(bench: Bench, cache: MakeCache) -> Tensor:
    inputs = bench.make_inputs(1, PROMPT)
    return bench.generate(
        inputs, cache(bench.model, ""), num_beams=3, num_return_sequences=2, length_penalty=0.5
    )


def padded(bench: Bench, cache: MakeCache) -> Tensor:
    return bench.generate(bench.make_inputs(3, PROMPT, padding=PADDING), cache(bench.model, ""))


def chunked_prefill(bench: Bench, cache: MakeCache) -> Tensor:
    inputs = bench.make_inputs(2, PROMPT, padding=PADDING)
    return bench.generate(inputs, cache(bench.model, ""), prefill_chunk_size=7)


def prompt_lookup(bench: Bench, cache: MakeCache) -> Tensor:
    return bench.generate(
        bench.make_inputs(1, PROMPT),
        cache(bench.model, ""),
        prompt_lookup_num_tokens=3,
        eos_token_id=NEVER_SAID,
    )


def assisted(bench: Bench, cache: MakeCache) -> Tensor:
    bench.assistant.generation_config.num_assistant_tokens = 4
    bench.assistant.generation_config.num_assistant_tokens_schedule = "constant"
    bench.assistant.generation_config.assistant_confidence_threshold = 0.0
    return bench.generate(
        bench.make_inputs(1, PROMPT), cache(bench.model, ""), assistant_model=bench.assistant
    )


def multi_turn(bench: Bench, cache: MakeCache) -> Tensor:
    """Three turns on one cache: short enough to begin inside a window and to end far outside."""
    return _turns(bench, cache, bench.make_inputs(1, 8))


def multi_turn_padded(bench: Bench, cache: MakeCache) -> Tensor:
    return _turns(bench, cache, bench.make_inputs(2, PROMPT, padding=5))


def _turns(bench: Bench, cache: MakeCache, inputs: Inputs) -> Tensor:
    model = bench.model
    kept = cache(model, "")
    ids_name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    mask_name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    for turn in range(3):
        # None, the default, means that each turn computes the whole conversation again.
        out = bench.generate(inputs, kept, num_new=NUM_PER_TURN)
        if turn == 2:
            break
        # The user speaks. An encoder's input is passed again; pixels were read in the first turn.
        if out.shape[1] == NUM_PER_TURN:  # whisper returns the new tokens alone
            out = torch.cat([inputs[ids_name], out], dim=1)
        new = token_ids(out.shape[0], 5, seed=20 + turn)
        ids = torch.cat([out, new], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : inputs[mask_name].shape[1]] = inputs[mask_name]
        if not model.config.is_encoder_decoder:
            inputs = {}
        inputs |= {ids_name: ids, mask_name: mask}
    return out


def static(bench: Bench, cache: MakeCache) -> Tensor:
    return _static(bench, cache, bench.make_inputs(1, PROMPT))


def static_padded(bench: Bench, cache: MakeCache) -> Tensor:
    return _static(bench, cache, bench.make_inputs(3, PROMPT, padding=PADDING))


def _static(bench: Bench, cache: MakeCache, inputs: Inputs) -> Tensor:
    """Room for exactly what comes."""
    prompt = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    assert prompt is not None
    return bench.generate(inputs, cache(bench.model, f"static({prompt.shape[1] + NUM_NEW})"))


def static_reference(bench: Bench, mode: str) -> Tensor:
    """What transformers' StaticCache gives in a static mode."""
    padding = {"static": 0, "static_padded": PADDING}[mode]
    inputs = bench.make_inputs(3 if padding else 1, PROMPT, padding=padding)
    return bench.generate(inputs, None, cache_implementation="static")


MODES: dict[str, Mode] = {
    "greedy": greedy,
    "sampling": sampling,
    "sampling_returns": sampling_returns,
    "beams": beams,
    "beam_returns": beam_returns,
    "padded": padded,
    "chunked_prefill": chunked_prefill,
    "prompt_lookup": prompt_lookup,
    "assisted": assisted,
    "multi_turn": multi_turn,
    "multi_turn_padded": multi_turn_padded,
    "static": static,
    "static_padded": static_padded,
}

#: Modes in which one cache serves several calls of `generate`.
TURNS = ("multi_turn", "multi_turn_padded")
#: Modes of the recipe `static(n)`.
STATIC = ("static", "static_padded")
