"""A cache inside a graph, and the modules that are traced.

Layers in a graph know shapes only: nothing is remembered as a Python number, so no length becomes a
constant. A window keeps ``min(stored + new, window - 1)`` tokens, which is an expression of shapes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mnemon.export.forms import CacheForm
from mnemon.export.kinds import GraphPart, GraphStates, GraphTokens, TokenPart
from mnemon.hf.base import CacheFacade, PairFacade
from mnemon.hf.exporting import FORGETS, BaseModelOutput, cache_argument, takes

__all__ = ["DecoderStep", "EncoderStep"]


class GraphLayer:
    """One layer in a graph: what a forward pass asks of it and nothing else.

    Args:
        parts: what it keeps; none for a layer that keeps nothing.
    """

    is_compileable = False
    is_croppable = False
    is_recording = False
    max_length = -1
    batch_size = -1

    def __init__(self, parts: Sequence[GraphPart]) -> None:
        self.parts = parts
        self.tokens = next((part for part in parts if isinstance(part, TokenPart)), None)
        self.states = next((part for part in parts if isinstance(part, GraphStates)), None)
        self.is_sliding = self.tokens is not None and self.tokens.window is not None
        self.is_linear = self.states is not None
        self.is_dummy = not parts
        self.counts_tokens = self.tokens is not None

    # Encoder-decoder models look at the tensors of the encoder's side themselves.

    @property
    def keys(self) -> Tensor | None:
        return self.tokens.keys if isinstance(self.tokens, GraphTokens) else None

    @property
    def values(self) -> Tensor | None:
        return self.tokens.values if isinstance(self.tokens, GraphTokens) else None

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    @property
    def num_tokens(self) -> Any:
        return 0 if self.tokens is None else self.tokens.length

    length_at_hand = num_tokens

    def traced_length(self) -> Any:
        return self.num_tokens

    def mask_sizes(self, num_new: int) -> tuple[Any, int]:
        return self.num_tokens + num_new, FORGETS if self.is_sliding else 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.tokens is not None
        return self.tokens.append(keys, values)

    def has_state(self, state_idx: int | None = None) -> bool:
        return self.states is not None

    def conv_state(self, state_idx: int = 0) -> Tensor | None:
        return None if self.states is None else self.states.conv_state(state_idx)

    def recurrent_state(self, state_idx: int = 0) -> Tensor | None:
        return None if self.states is None else self.states.recurrent_state(state_idx)

    def update_conv_state(self, new: Tensor, state_idx: int, kernel: int | None) -> Tensor:
        assert self.states is not None
        return self.states.update_conv_state(new, state_idx, kernel)

    def update_recurrent_state(self, new: Tensor, state_idx: int) -> Tensor:
        assert self.states is not None
        return self.states.update_recurrent_state(new, state_idx)


class GraphCache(CacheFacade):
    """A cache of such layers."""

    def __init__(self, layers: list[GraphLayer]) -> None:
        self._init_facade(layers)


class GraphPair(CacheFacade, PairFacade):
    """The cache of an encoder-decoder model in a graph."""

    def __init__(self, own: list[GraphLayer], cross: list[GraphLayer]) -> None:
        self._init_facade(own)
        self._init_pair(GraphCache(own), GraphCache(cross))
        self.is_updated = {i: layer.keys is not None for i, layer in enumerate(cross)}


def _held(layers: Sequence[GraphLayer]) -> list[Tensor]:
    return [tensor for layer in layers for part in layer.parts for tensor in part.held()]


class DecoderStep(nn.Module):
    """New tokens and the tensors of a cache in; logits and the tensors of the cache out.

    Args:
        model: a causal LM, or an encoder-decoder model, whose encoder's keys come as tensors.
        form: the cache's form.
        extras: names of further inputs of the model's forward.
        batch: rows of what the graph itself holds; of a static form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        form: CacheForm,
        extras: tuple[str, ...],
        batch: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.extras = extras
        self._buffer_names: list[list[str]] = []
        for index, part, _ in form.parts:
            names = []
            for number, buffer in enumerate(part.buffers(batch or 1, model.dtype)):
                names.append(f"held_{index}_{number}")
                self.register_buffer(names[-1], buffer.to(model.device))
            self._buffer_names.append(names)
        self.makes_positions = takes(model, "position_ids") and "position_ids" not in extras

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
        source_mask: list[Tensor],
        extras: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One call.

        Args:
            input_ids: [batch, query].
            attention_mask: [batch, past + query], 0 where padded.
            past: the cache's own tensors, in the order of `CacheForm.own_slots`.
            cross: the encoder's, in the order of `CacheForm.cross_slots`.
            source_mask: the encoder's mask [batch, source], or nothing.
            extras: in the order of `extras`.

        Returns:
            Logits [batch, query, vocabulary], and the cache's own tensors.
        """
        own = self._layers(past, attention_mask.shape[1] - input_ids.shape[1])
        named: dict[str, Any] = dict(zip(self.extras, extras, strict=True))
        if self.makes_positions:
            positions = attention_mask.to(torch.int64).cumsum(-1) - 1
            positions = positions.clamp(min=0)
            num_new = input_ids.shape[1]
            newest = torch.arange(num_new, device=positions.device)
            newest = newest + (positions.shape[1] - num_new)
            named["position_ids"] = positions.index_select(1, newest)
        if cross:
            pairs = zip(cross[::2], cross[1::2], strict=True)
            beside = [GraphLayer([GraphTokens(keys, values)]) for keys, values in pairs]
            # Its keys are there: of the encoder's output only the shape is looked at.
            shape = (input_ids.shape[0], cross[0].shape[2], self.model.config.d_model)
            hidden = torch.zeros(shape, dtype=cross[0].dtype, device=cross[0].device)
            outputs = self.model(
                decoder_input_ids=input_ids,
                decoder_attention_mask=attention_mask,
                attention_mask=source_mask[0],
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                past_key_values=GraphPair(own, beside),
                use_cache=True,
                return_dict=True,
                **named,
            )
        else:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=True,
                return_dict=True,
                **{cache_argument(self.model): GraphCache(own)},
                **named,
            )
        is_token = attention_mask[:, -1].to(torch.bool)
        for layer in own:
            for part in layer.parts:
                part.settle(is_token)
        return outputs.logits, _held(own)

    def _layers(self, past: Sequence[Tensor], num_seen: Any) -> list[GraphLayer]:
        parts: list[list[GraphPart]] = [[] for _ in self.form.layers]
        groups = zip(self.form.grouped(past), self._buffer_names, strict=True)
        for (index, part, tensors), names in groups:
            buffers = [getattr(self, name) for name in names]
            parts[index].append(part.in_graph(buffers or tensors, num_seen))
        return [GraphLayer(some) for some in parts]


class EncoderStep(nn.Module):
    """An encoder's input in; the keys and values that every decoder layer reads of it out.

    Args:
        model: an encoder-decoder model.
        form: the cache's form.
    """

    def __init__(self, model: PreTrainedModel, form: CacheForm) -> None:
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Ids and mask [batch, source] to the tensors of `CacheForm.cross_slots`."""
        encoded = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True
        )
        own = [GraphLayer([GraphTokens(window=part.window)]) for _, part, _ in self.form.parts]
        cross = [GraphLayer([GraphTokens()]) for _ in self.form.layers]
        # One token through the decoder writes them; what it says itself is not in the graph.
        first = torch.zeros((input_ids.shape[0], 1), dtype=torch.int64, device=input_ids.device)
        self.model(
            decoder_input_ids=first,
            attention_mask=attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state),
            past_key_values=GraphPair(own, cross),
            use_cache=True,
            return_dict=True,
        )
        return _held(cross)
