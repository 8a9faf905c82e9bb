"""Generating with an export: the loop around its steps, the same for every target."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mnemon.errors import ExportError
from mnemon.export.exported import Exported, as_mask
from mnemon.export.held import HeldCache
from mnemon.hf.exporting import sampling_warpers

__all__ = ["Runner"]


class Runner:
    """`generate` for an exported model, on torch, onnxruntime or AOTInductor alike.

    Args:
        exported: the export; its parts are loaded now.
    """

    def __init__(self, exported: Exported) -> None:
        others = [name for name in exported.manifest.extras if name != "position_ids"]
        if others:
            raise ExportError(
                f"The export takes {', '.join(others)} at every step, which a loop over tokens "
                f"cannot make. Call the export itself, or export without them."
            )
        self.exported = exported
        self._sessions = exported.sessions
        ignored = exported.manifest.generation.get("not_served")
        if ignored:
            warnings.warn(
                f"The model's generation config sets {', '.join(ignored)}; an export's runner "
                f"takes the likeliest token or draws, without those.",
                stacklevel=2,
            )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue a batch of prompts.

        Args:
            input_ids: [batch, prompt], padded on the left; of the encoder where there is one.
            attention_mask: [batch, prompt], 0 where padded; all ones if None.
            max_new_tokens: at most so many.
            eos_token_id: stops a row; the model's own if None.
            pad_token_id: fills rows that stopped; the model's own, else the first stop token.
            do_sample: draw instead of taking the likeliest token; None: as the model's generation
                config says.
            temperature, top_k, top_p: of the draw; None: the generation config's.
            generator: of the draw.
            on_token: called with the new tokens [batch] after every step.

        Returns:
            [batch, prompt + new]; of an encoder-decoder model [batch, 1 + new].

        Raises:
            ExportError: shapes that the export does not serve.
        """
        known = self.exported.manifest.generation
        draws = bool(known.get("do_sample", False) if do_sample is None else do_sample)
        heat = float(known.get("temperature", 1.0) if temperature is None else temperature)
        top_k = known.get("top_k") if top_k is None else top_k
        top_p = known.get("top_p") if top_p is None else top_p
        _check_draw(heat, top_k, top_p)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ExportError(
                f"max_new_tokens is {max_new_tokens!r}; a whole number of at least 1 was expected."
            )
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ExportError(
                f"input_ids has shape {list(input_ids.shape)}; expected [batch, prompt] with at "
                f"least one token."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ExportError(
                f"attention_mask {list(attention_mask.shape)} does not cover input_ids "
                f"{list(input_ids.shape)}."
            )
        attention_mask = as_mask(attention_mask)
        exported, form = self.exported, self.exported.form
        if not form.has_cross and not bool(attention_mask[:, -1].all()):
            raise ExportError(
                "attention_mask ends in padding: pad prompts on the left, so that the last column "
                "is a token of every row."
            )
        stops = _stops(known.get("eos_token_id") if eos_token_id is None else eos_token_id)
        pad = known.get("pad_token_id") if pad_token_id is None else pad_token_id
        pad = (stops[0] if stops else 0) if pad is None else pad
        warpers = sampling_warpers(heat, top_k, top_p) if draws else None
        batch = input_ids.shape[0]
        cross: list[Any] = []
        source_mask = None
        if form.has_cross:
            source_mask = attention_mask
            cross = exported.encode(input_ids, attention_mask)
            start = known.get("decoder_start_token_id")
            if start is None:
                raise ExportError("The export does not say with which token its decoder starts.")
            input_ids = torch.full((batch, 1), int(start), dtype=torch.int64)
            attention_mask = torch.ones_like(input_ids)
        past: list[Any] = list(form.empty(batch, exported.dtype, "cpu"))
        shown = [self._sessions["encoder"].tensor(one) for one in cross]
        positions = self._positions(attention_mask)
        exported.check_call(
            input_ids, attention_mask, past, shown, source_mask, positions, max_new_tokens - 1
        )
        handle = HeldCache()
        if form.is_static:
            exported.claim(handle)
        tokens, new = input_ids, input_ids
        running = torch.ones(batch, dtype=torch.bool)
        one = torch.ones((batch, 1), dtype=attention_mask.dtype)
        for _ in range(max_new_tokens):
            extras = [p[:, -new.shape[1] :] for p in positions]
            with exported.lock if form.is_static else nullcontext():
                if form.is_static:
                    exported.check_held(handle)
                logits, past = exported.feed(new, attention_mask, past, cross, source_mask, extras)
            scores = logits[:, -1].float()
            if warpers is None:
                chosen = scores.argmax(-1)
            else:
                chances = torch.softmax(warpers(tokens, scores), dim=-1)
                chosen = torch.multinomial(chances, 1, generator=generator).squeeze(1)
            chosen = torch.where(running, chosen, pad)
            if on_token is not None:
                on_token(chosen)
            new = chosen[:, None]
            tokens = torch.cat([tokens, new], dim=1)
            attention_mask = torch.cat([attention_mask, one], dim=1)
            positions = self._positions(attention_mask)
            for stop in stops:
                running &= chosen != stop
            if stops and not bool(running.any()):
                break
        return tokens

    def _positions(self, mask: Tensor) -> list[Tensor]:
        if not self.exported.manifest.extras:
            return []
        return [(mask.cumsum(-1) - 1).clamp(min=0)]


def _check_draw(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 < temperature < float("inf"):
        raise ExportError(
            f"temperature is {temperature}; a positive number was expected, or do_sample=False for "
            f"the likeliest token."
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ExportError(f"top_k is {top_k!r}; a whole number was expected, 0 for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ExportError(f"top_p is {top_p!r}; a number above 0 and up to 1 was expected.")


def _stops(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)
