"""The forward of a retrofitted attention module: the module's own parts around decisions.

Without a cache all tokens are computed at once: pooled keys and values (DMC), and masks that hide
what the cache would no longer hold. With a `mnemon.Cache` the layer's own slots are read.
"""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemon.compression import Compression
from mnemon.errors import LearnedMemoryError
from mnemon.hf import compressing as hf
from mnemon.layers.compressing import CompressingLayer
from mnemon.memory.retrofitting import decisions
from mnemon.memory.retrofitting.cached import attend_cached
from mnemon.memory.retrofitting.control import Control
from mnemon.memory.retrofitting.parallel import drop_scores, pool, shift_left
from mnemon.memory.retrofitting.parts import Decided, first_tokens, place, valid_tokens

__all__ = ["PROJECTION", "CompressedForward"]

PROJECTION = "mnemon_decision"
"""The name of the decision's projection in an attention module."""


@final
class CompressedForward:
    """Stands in for the `forward` of one attention module.

    An object, not a closure, so that copies and pickles of the model refer to themselves.
    """

    def __init__(self, module: nn.Module, control: Control) -> None:
        self.module = module
        self.control = control

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module, control = self.module, self.control
        if position_embeddings is None:
            raise LearnedMemoryError(
                f"{type(module).__name__} was called without position_embeddings: expected the "
                f"call that its own model makes."
            )
        if past_key_values is None:
            past_key_values = kwargs.pop("past_key_value", None)
        layer = None if past_key_values is None else self._layer(past_key_values)
        decided = self._decide(hidden_states)
        if layer is None:
            return self._all_at_once(
                decided, position_embeddings, attention_mask, past_key_values, kwargs
            )
        attended = attend_cached(
            module, control, layer, decided, position_embeddings, attention_mask
        )
        return hf.output(module, attended), None

    def _layer(self, cache: Any) -> CompressingLayer | None:
        """The layer of `cache` that compresses; None where a model made an empty cache unasked."""
        module, control = self.module, self.control
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layers = getattr(cache, "layers", [])
        layer = layers[index] if index < len(layers) else None
        method = control.compression.method
        if isinstance(layer, CompressingLayer) and layer.method == method:
            if control.relaxed:
                raise LearnedMemoryError(
                    "Relaxed decisions are for training without a cache: pass use_cache=False."
                )
            return layer
        if cache.get_seq_length(index):
            raise LearnedMemoryError(
                f"{type(module).__name__} compresses its cache ({method}) and got "
                f"{type(cache).__name__} with {cache.get_seq_length(index)} tokens, which keeps "
                f"what it should drop. Pass past_key_values=mnemon.Cache(model.config)."
            )
        return None

    def _decide(self, hidden: Tensor) -> Decided:
        module, control = self.module, self.control
        compression = control.compression
        query, keys, values = hf.project(module, hidden)
        decided = None
        if compression.source == "projection":
            decided = decisions.project_decision(getattr(module, PROJECTION), hidden)
        logits = decisions.decision_logits(compression, query, keys, decided)
        weights = None
        if compression.method == "dmc":
            weights = decisions.merge_weights(query, keys.shape[1])
        query, keys = decisions.borrow(compression, query, keys, control.neuron_left)
        return Decided(query, keys, values, logits, weights)

    def _all_at_once(
        self,
        decided: Decided,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        module, control = self.module, self.control
        compression, logits = control.compression, decided.logits
        seen = hf.as_seen(mask)
        valid = valid_tokens(seen, logits.shape[-1])
        if control.relaxed:
            logits = decisions.soft_decisions(logits, control.generator)
            compressed = torch.sigmoid(logits)
            log_kept = F.logsigmoid(-logits)
        else:
            compressed = (logits > 0).to(logits.dtype)
            log_kept = torch.zeros_like(logits).masked_fill(logits > 0, -torch.inf)
        first = first_tokens(valid, logits)
        compressed = compressed.masked_fill(first, 0.0)
        log_kept = log_kept.masked_fill(first, 0.0)
        self._record(compressed)
        keys, values = decided.keys, decided.values
        if compression.method == "dmc":
            keys, values = pooled(compression, decided, compressed, valid)
        query, keys = place(module, compression, decided.query, keys, position_embeddings,
                            control.neuron_left)  # fmt: skip
        values = values.to(query.dtype)
        if cache is not None:
            # Nothing reads it: a second call with it is refused.
            cache.update(keys, values, int(module.layer_idx))  # type: ignore[arg-type]
        if not control.relaxed and not bool(compressed.any()):
            out, weights = hf.attend_plainly(module, query, keys, values, mask, **kwargs)
            return hf.output(module, out.transpose(1, 2)), weights
        window = 0 if compression.method == "dmc" else compression.window
        scores = drop_scores(
            shift_left(log_kept), window, query.shape[2], hf.sliding_window(module)
        )
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        scores = scores.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).to(query.dtype)
        scale = float(module.scaling)  # type: ignore[arg-type]
        out = F.scaled_dot_product_attention(
            query, keys, values, scores, scale=scale, enable_gqa=True
        )
        if seen is not None:
            out = out.nan_to_num(0.0)  # rows of padding see nothing
        return hf.output(module, out), None

    def _record(self, compressed: Tensor) -> None:
        control = self.control
        if control.relaxed and control.compression.method == "dms":
            # Straight through: counted as 0 or 1, with the gradient of the relaxed decision.
            hard = (compressed > 0.5).to(compressed.dtype)
            compressed = compressed + (hard - compressed).detach()
        control.record(int(self.module.layer_idx), compressed)  # type: ignore[arg-type]


def pooled(
    compression: Compression, decided: Decided, merged: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """DMC's keys and values of a call without a past, in the dtype of the decisions."""
    assert decided.weights is not None
    weights = decided.weights if valid is None else decided.weights * valid[:, None]
    keys = pool(decided.keys.to(merged.dtype), weights, merged, compression.window)
    values = pool(decided.values.to(merged.dtype), weights, merged, compression.window)
    return keys, values
