"""The names that transformers and its models call on a cache, translated to our verbs."""

from abc import ABC
from typing import Any

import torch

from mnemon.errors import CacheError
from mnemon.hf.versions import current

__all__ = ["CacheFacade", "PairFacade"]


class _Verbs(current.CacheBase, ABC):
    """What transformers 5.23 calls; older releases see it through their `Calls`."""

    layers: list[Any]

    def _init_facade(self, layers: list[Any]) -> None:
        """Give transformers' base class its layers; it annotates them as its own."""
        current.prepare_layers(layers)
        current.CacheBase.__init__(self, layers=layers)

    # -- what a forward pass calls ---------------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to layer `layer_idx`; returns what attention reads (see `CacheLayer.append`)."""
        result: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].append(
            key_states, value_states
        )
        return result

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        kernel = kwargs.get("conv_kernel_size")
        result: torch.Tensor = self.layers[layer_idx].update_conv_state(
            conv_states, state_idx, kernel
        )
        return result

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        layer = self.layers[layer_idx]
        result: torch.Tensor = layer.update_recurrent_state(recurrent_states, state_idx)
        return result

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state: torch.Tensor | None = self.layers[layer_idx].conv_state(state_idx)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state: torch.Tensor | None = self.layers[layer_idx].recurrent_state(state_idx)
        return state

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        if layer_idx is None:
            layer_idx = self._last_with_state()
        return bool(self.layers[layer_idx].has_state(state_idx))

    def _last_with_state(self) -> int:
        for index in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[index]
            if layer.is_linear or getattr(layer, "recurrent", None) is not None:
                return index
        raise CacheError("has_previous_state: no layer of this cache keeps a recurrent state.")

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        result: torch.Tensor = self.layers[layer_idx].update_indexer(indexer_key_states)
        return result

    # -- lengths and masks -----------------------------------------------------------------------

    def _token_layer(self, layer_idx: int) -> Any | None:
        """Layer `layer_idx`, or the first that counts tokens if that one does not."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is None or layer.counts_tokens:
            return layer
        return next((layer for layer in self.layers if layer.counts_tokens), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: an int snapshot (while a graph is compiled, the counter on the device)."""
        layer = self._token_layer(layer_idx)
        if layer is None:
            return self._length_without_tokens()
        length: int = layer.traced_length()
        return length

    def _length_without_tokens(self) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self._token_layer(layer_idx)
        if layer is None:
            return query_length, 0
        if not torch.compiler.is_compiling():
            self._check_lengths(layer_idx)
        sizes: tuple[int, int] = layer.mask_sizes(query_length)
        return sizes

    def _check_lengths(self, start: int) -> None:
        """Refuse to go on from a forward pass that stopped halfway.

        When a mask is made, no layer from the one at `start` on was written in this forward (most
        models make all masks first, a few make each before its layer): all that hold tokens hold
        as many. After an exception on the way (Ctrl-C, a full disk) they do not, and attention
        would go on with rows that belong to different positions.
        """
        first, expected = -1, 0
        for index, layer in enumerate(self.layers):
            if index < start or not layer.counts_tokens or layer.is_dummy:
                continue
            length = layer.length_at_hand
            if not length or length == expected:  # unknown, or not used by this model
                continue
            if first >= 0:
                raise CacheError(
                    f"The layers of this cache hold different numbers of tokens (layer {first}: "
                    f"{expected}, layer {index}: {length}): a forward pass was interrupted before "
                    f"it reached them all. Reset the cache, cache.reset(), and pass the whole "
                    f"prompt again. A model under mnemon.attach(model) puts the cache back itself."
                )
            first, expected = index, length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that can be held; -1 without a bound (the contract of transformers 5.13+)."""
        if layer_idx is None:
            return max((layer.max_length for layer in self.layers), default=-1)
        return int(self.layers[layer_idx].max_length) if layer_idx < len(self.layers) else -1

    # -- what generation calls -------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        self._set_recording(True)

    def _set_recording(self, on: bool) -> None:
        for layer in self.layers:
            layer.set_recording(on)

    def is_recording_past(self, layer_idx: int) -> bool:
        return bool(self.layers[layer_idx].is_recording)

    @property
    def is_compileable(self) -> bool:
        return bool(self.layers) and all(layer.is_compileable for layer in self.layers)

    @property
    def is_initialized(self) -> bool:
        layers = [layer for layer in self.layers if layer.counts_tokens]
        return bool(layers) and all(layer.batch_size > 0 for layer in layers)

    @property
    def is_croppable(self) -> bool:
        return all(layer.is_croppable for layer in self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.is_sliding for layer in self.layers]

    @property
    def is_linear(self) -> list[bool]:
        return [layer.is_linear for layer in self.layers]

    @property
    def is_dummy(self) -> list[bool]:
        return [layer.is_dummy for layer in self.layers]

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate before the first forward, from shapes alone (export, compiled prefill)."""
        count = len(self.layers)
        heads = [num_heads] * count if isinstance(num_heads, int) else num_heads
        widths = [head_dim] * count if isinstance(head_dim, int) else head_dim
        if len(heads) != count or len(widths) != count:
            raise CacheError(
                f"The cache has {count} layers; got {len(heads)} num_heads and {len(widths)} "
                f"head_dim."
            )
        for layer, layer_heads, width in zip(self.layers, heads, widths, strict=True):
            if layer.counts_tokens and layer.batch_size < 0:
                nothing = torch.zeros(
                    (batch_size, layer_heads, 0, width), dtype=dtype, device=device
                )
                layer.append(nothing, nothing)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: tiers are part of the recipe, not switched from outside."""

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: see `offload`."""


class CacheFacade(current.Calls, _Verbs, ABC):
    """A real ``transformers.Cache`` whose layers follow mnemon's contract.

    Subclasses set `layers` (a list of `mnemon.layers.CacheLayer`) and carry out the verbs.
    """


class PairFacade(current.PairBase):
    """What makes a pair of caches a real ``transformers.EncoderDecoderCache``."""

    self_attention_cache: Any
    cross_attention_cache: Any

    def _init_pair(self, decoder: CacheFacade, cross: CacheFacade) -> None:
        current.PairBase.__init__(self, decoder, cross)
