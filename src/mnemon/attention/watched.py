"""Keys that are watched: whoever keeps them learns how queries attended to them.

    layer.append  ->  WatchedTensor(keys, watch)  ->  attention  ->  watch.told(padding, weights)

mnemon's attention takes the keys out, attends, and tells. torch's own
``scaled_dot_product_attention`` is recognised where it is given the tensor itself or what a model
makes of it without changing a number (`repeat_kv`). Any other function is given the numbers, and
the watch is told that somebody read them who says nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemon.attention.weights import HIDDEN_BELOW, column_weights, last_weights
from mnemon.errors import CacheError
from mnemon.formats.stand_in import StandIn

__all__ = ["Seen", "Wants", "Watch", "WatchedTensor", "report"]

Wants = Literal["nothing", "sums", "last"]
"""What a policy asks of attention: nothing, all weights summed, or those of the last query."""


class Seen(NamedTuple):
    """What attention tells of one append.

    Attributes:
        padding: bool ``[batch, new]``, which of the new tokens are padding; None: none.
        weights: float32 ``[batch, kv_heads, tokens]``; None where none were asked for.
        is_biased: numbers that are no mask were added to the scores (ALiBi, relative positions).
    """

    padding: Tensor | None
    weights: Tensor | None
    is_biased: bool


class Watch(ABC):
    """Watches the keys of one append, until it was told once.

    Attributes:
        wants: what `told` is to bring.
        shape: ``[batch, kv_heads, tokens, head_dim]`` of the keys.
        num_new: tokens of the append.
        visible: bool ``[batch, kv_heads, past]``: which older tokens are no padding, where the
            model's mask can no longer say it (its columns are not theirs); None where it can.
    """

    wants: Wants
    shape: tuple[int, int, int, int]
    num_new: int
    visible: Tensor | None = None

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether it is still to be told."""

    @abstractmethod
    def told(self, seen: Seen) -> None:
        """Attention ran, for the first time."""

    @abstractmethod
    def was_read(self) -> None:
        """Somebody took the numbers who will tell nothing."""

    def mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The model's mask with the columns of older tokens as they really are.

        Raises:
            CacheError: there is no mask where one is needed.
        """
        if self.visible is None:
            return mask
        past = self.visible.shape[-1]
        heads = query.shape[1] // self.shape[1]
        visible = self.visible.repeat_interleave(heads, dim=1)[:, :, None]
        if mask is None:
            if self.num_new > 1:
                raise CacheError(
                    f"{self.num_new} tokens came without a mask on a cache from which padding was "
                    f"dropped: pass the attention mask."
                )
            mask = torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=query.device)
        mask = mask.expand(query.shape[0], query.shape[1], *mask.shape[2:])
        visible = visible.expand(*mask.shape[:3], past)
        if mask.dtype != torch.bool:
            numbers = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device)
            visible = numbers.masked_fill(~visible, torch.finfo(mask.dtype).min)
        return torch.cat([visible, mask[..., past:]], dim=-1)


@final
class WatchedTensor(StandIn):
    """Looks like `content`, the keys ``[batch, kv_heads, tokens, head_dim]`` that attention reads.

    Args:
        content: dense, packed or streamed keys.
        watch: who is told.
    """

    content: Tensor
    watch: Watch

    @staticmethod
    def __new__(cls, content: Tensor, watch: Watch) -> "WatchedTensor":
        made: WatchedTensor = Tensor._make_wrapper_subclass(
            cls, content.shape, dtype=content.dtype, device=content.device
        )
        made.content, made.watch = content, watch
        return made

    def __init__(self, content: Tensor, watch: Watch) -> None:
        del content, watch  # kept by __new__

    def numbers(self) -> Tensor:
        """An ordinary tensor, for whoever tells the watch."""
        return self.content.dense() if isinstance(self.content, StandIn) else self.content

    def dense(self) -> Tensor:
        if self.watch.is_open:
            if self.watch.visible is not None:
                raise CacheError(
                    "This cache dropped padding from between the tokens of a row, so the model's "
                    "mask no longer fits, and an attention that mnemon does not know read the "
                    "keys. Call mnemon.attach(model) before the first forward."
                )
            self.watch.was_read()
        return self.numbers()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _attention_of_torch(*args, **kwargs)
        if func in _FOLLOWED and isinstance(args[0], WatchedTensor):
            watched = args[0]
            return WatchedTensor(func(watched.numbers(), *args[1:], **kwargs), watched.watch)
        return super().__torch_function__(func, types, args, kwargs)


#: What models do to keys on their way to attention, the numbers staying what they are.
_FOLLOWED: frozenset[Any] = frozenset(
    [
        *(Tensor.__getitem__, Tensor.expand, Tensor.reshape, Tensor.view, Tensor.contiguous),
        *(Tensor.to, Tensor.unsqueeze, Tensor.flatten, Tensor.repeat_interleave),
        *(torch.unsqueeze, torch.reshape, torch.flatten, torch.repeat_interleave),
    ]
)


def _attention_of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``scaled_dot_product_attention``, told."""
    watch = key.watch if isinstance(key, WatchedTensor) else None
    query, value = (x.dense() if isinstance(x, StandIn) else x for x in (query, value))
    if watch is None:
        keys = key.dense() if isinstance(key, StandIn) else key
        return F.scaled_dot_product_attention(
            query, keys, value, attn_mask, dropout_p, is_causal, **options
        )
    assert isinstance(key, WatchedTensor)
    keys = key.numbers()
    mask = watch.mask(attn_mask, query)
    out = F.scaled_dot_product_attention(query, keys, value, mask, dropout_p, is_causal, **options)
    # torch aligns its causal flag at the first token, which is ours where nothing came before.
    if is_causal and keys.shape[-2] != query.shape[-2]:
        watch.was_read()
    else:
        report(watch, query, keys, mask=mask, scale=options.get("scale"), causal=is_causal)
    return out


@torch.no_grad()
def report(
    watch: Watch,
    query: Tensor,
    keys: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Tell `watch` of one call of attention.

    Args:
        watch: of the keys.
        query: [batch, heads, new, head_dim]; of one new token also [batch, kv_heads, group,
            head_dim].
        keys: what the watch's tensor held, or that with every head repeated for its queries.
        mask, scale, causal, softcap, sinks, bias: as `mnemon.attention.attend` takes them.
    """
    if not watch.is_open:
        return
    heads = watch.shape[1]
    if not _is_whole(watch, query, keys, mask):
        watch.was_read()
        return
    if keys.shape[1] != heads:
        keys = keys[:, :: keys.shape[1] // heads]
    query, mask, bias = query.detach(), _detached(mask), _detached(bias)
    past = keys.shape[2] - watch.num_new
    padding = None if mask is None else _padding(mask, watch, past)
    options: dict[str, Any] = {
        "padding": padding, "mask": mask, "scale": scale, "causal": causal, "softcap": softcap,
        "sinks": sinks, "bias": bias,
    }  # fmt: skip
    weights = None
    if watch.wants == "sums":
        weights = column_weights(query, keys, num_new=watch.num_new, **options)
    elif watch.wants == "last":
        weights = last_weights(query, keys, num_new=watch.num_new, **options)
    is_biased = bias is not None or (mask is not None and _says_more(mask))
    watch.told(Seen(padding, weights, is_biased))


def _is_whole(watch: Watch, query: Tensor, keys: Tensor, mask: Tensor | None) -> bool:
    """Whether these are the keys that were handed out, against queries of the new tokens."""
    batch, heads, tokens, width = watch.shape
    shape = tuple(keys.shape)
    if len(shape) != 4 or query.ndim != 4 or query.shape[0] != batch:
        return False
    if (shape[0], *shape[2:]) != (batch, tokens, width) or shape[1] % heads:
        return False
    if query.shape[1] % shape[1] or (watch.num_new > 1 and query.shape[2] != watch.num_new):
        return False
    if mask is not None and (mask.ndim != 4 or mask.shape[-1] != tokens):
        return False
    repeats = shape[1] // heads
    if repeats == 1:
        return True
    # Heads that were repeated as `repeat_kv` does, not tiled.
    newest = keys[:, :, -1].unflatten(1, (heads, repeats))
    return bool((newest == newest[:, :, :1]).all())


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _padding(mask: Tensor, watch: Watch, past: int) -> Tensor | None:
    """Which new tokens do not see themselves: bool ``[batch, new]``; None where that is none."""
    columns = mask[..., past:]
    if mask.shape[2] == watch.num_new > 1:
        own = columns.diagonal(dim1=2, dim2=3)
    else:
        own = columns[:, :, 0]
    visible = own if own.dtype == torch.bool else own > HIDDEN_BELOW
    hidden = ~visible.any(dim=1)
    # Of one token on an accelerator the answer is not waited for.
    if (watch.num_new > 1 or hidden.device.type == "cpu") and not bool(hidden.any()):
        return None
    return hidden.expand(watch.shape[0], -1)


def _says_more(mask: Tensor) -> bool:
    """Whether a mask of numbers does more than to hide."""
    if mask.dtype == torch.bool:
        return False
    return bool(((mask > HIDDEN_BELOW) & (mask != 0)).any())
