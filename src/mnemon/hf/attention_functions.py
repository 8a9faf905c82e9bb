"""What transformers calls: mnemon's attention in the shape of an attention function.

Two names are registered, one for each implementation that mnemon stands in for:

    "mnemon"         for "sdpa":  mask None means causal (if several rows), masks are bool
    "mnemon_eager"   for "eager": mask None means no mask, masks are numbers added to the scores

so that what an argument means never depends on state. Whatever these functions do not serve goes
to the function that the model used before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mnemon.attention import cpu
from mnemon.attention.dispatch import FEW_ROWS, attend
from mnemon.attention.grouped import fused_attention, spread_attention
from mnemon.attention.stream import StreamedTensor
from mnemon.attention.watched import WatchedTensor, report
from mnemon.errors import ModelError
from mnemon.formats import PackedTensor
from mnemon.hf.eager import eager_function
from mnemon.hf.masks import ATTENTION_NAME, EAGER_NAME, register_masks
from mnemon.hf.versions import current

__all__ = ["attention_forward", "eager_attention_forward", "register"]

_Output = tuple[Tensor, Tensor | None]


def register() -> None:
    """Make both names known to transformers, masks included; doing it again changes nothing."""
    register_masks()
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionInterface.register(EAGER_NAME, eager_attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> _Output:
    """Attention under the conventions of transformers' "sdpa" function.

    Args:
        module: the attention module that calls.
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        attention_mask: bool or additive, [batch, 1 or heads, new, tokens]; None is causal for
            several rows (of an empty cache: row i sees tokens 0..i) and unmasked for one.
        dropout: probability of dropping a weight (training).
        scaling: factor on the dot products; None is ``head_dim ** -0.5``.
        is_causal: overrides ``module.is_causal``.
        position_bias: numbers added to the scores, [batch or 1, heads, new, tokens].
        **kwargs: ``softcap`` and ``s_aux`` (sinks) are honoured; the rest means nothing to "sdpa".

    Returns:
        The output, [batch, new, heads, value_dim], contiguous; and the attention weights where
        they were asked for (by the model's own function), otherwise None.

    Raises:
        ModelError: soft-capping or sinks together with dropout or attention weights, in a model
            whose own function cannot be found.
    """
    if isinstance(key, WatchedTensor):
        return _watched(
            attention_forward, module, query, key, value, attention_mask,
            causal=query.shape[2] > 1 and _is_causal(module, is_causal),
            dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias,
            **kwargs,
        )  # fmt: skip
    if _traced():
        common = False
    else:
        common = (
            position_bias is None
            and not dropout
            and _plain(kwargs)
            and _foldable(query, key, attention_mask)
        )
    if not common:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return _uncommon(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    num_new = query.shape[2]
    if (num_new == 1 or attention_mask is not None) and cpu.serves(
        query, key, value, attention_mask
    ):
        out = cpu.decode(query, key, value, mask=attention_mask, scale=scaling)
    elif isinstance(key, PackedTensor | StreamedTensor) and (
        attention_mask is not None or num_new == 1
    ):
        out = attend(query, key, value, mask=attention_mask, scale=scaling)
    elif num_new == 1 or (attention_mask is not None and num_new <= FEW_ROWS):
        out = fused_attention(query, key, value, attention_mask, scaling)
    elif (
        attention_mask is not None
        and key.shape[2] >= 2 * num_new
        and query.shape[1] != key.shape[1]
        and query.device.type == "cpu"
    ):
        # A chunk of a prompt on a long past: "sdpa" would repeat all keys for the query heads.
        out = spread_attention(query, key, value, attention_mask, scaling, causal=False)
    else:
        return _uncommon(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
        )
    return out.transpose(1, 2).contiguous(), None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> _Output:
    """Attention under the conventions of a model's own "eager" function, keys read in place.

    `enable` chooses it only for modules whose own function was run beside it and agreed. Dropout,
    attention weights, compilation and an implied scaling stay with the model's own function.

    Args:
        module: the attention module that calls.
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        attention_mask: numbers added to the scores, [batch, 1 or heads, new, tokens]; None: none.
        scaling: factor on the dot products.
        dropout: probability of dropping a weight (training).
        **kwargs: ``softcap``, ``s_aux`` (sinks) and ``position_bias`` are honoured.

    Returns:
        The output, [batch, new, heads, value_dim], contiguous; and the weights or None.

    Raises:
        ModelError: the model's own function is needed and cannot be found.
    """
    if isinstance(key, WatchedTensor):
        return _watched(
            eager_attention_forward, module, query, key, value, attention_mask,
            causal=False, scaling=scaling, dropout=dropout, **kwargs,
        )  # fmt: skip
    if (
        _traced()
        or dropout
        or scaling is None
        or _weights_wanted(kwargs)
        or kwargs.get("head_mask") is not None
        or not _foldable(query, key, attention_mask)
    ):
        own = eager_function(module)
        if own is None:
            raise ModelError(
                f"{type(module).__name__} was given dropout, compilation or output_attentions, "
                "which its own attention function must serve, and none was found in its file: "
                "expected eager_attention_forward beside its forward; detach mnemon first"
            )
        weighed: _Output = own(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return weighed
    out = attend(
        query,
        key,
        value,
        mask=attention_mask,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        bias=kwargs.get("position_bias"),
    )
    return out.transpose(1, 2).contiguous(), None


def _watched(
    forward: Callable[..., _Output],
    module: nn.Module,
    query: Tensor,
    key: WatchedTensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    **options: Any,
) -> _Output:
    """``forward`` over the keys that are watched, and what it saw for who watches them.

    `causal`: what no mask means.
    """
    watch, keys = key.watch, key.content
    mask = watch.mask(mask, query)
    out = forward(module, query, keys, value, mask, **options)
    causal = causal and mask is None
    if causal and query.shape[2] != keys.shape[2]:
        watch.was_read()  # rows then see the first tokens only
    else:
        report(
            watch, query, keys,
            mask=mask, scale=options.get("scaling"), causal=causal, softcap=options.get("softcap"),
            sinks=options.get("s_aux"), bias=options.get("position_bias"),
        )  # fmt: skip
    return out


def _uncommon(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> _Output:
    """Everything that the fast paths do not serve, each by the function that is right for it."""
    changed_scores = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    weights_wanted = not torch.compiler.is_compiling() and _weights_wanted(kwargs)
    if not changed_scores and not weights_wanted:
        before: _Output = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return before

    num_new = query.shape[2]
    causal = mask is None and num_new > 1 and _is_causal(module, is_causal)
    if causal and key.shape[2] > num_new:
        key, value = key[:, :, :num_new], value[:, :, :num_new]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :num_new]
    if not dropout and not weights_wanted:
        out = attend(
            query, key, value, mask=mask, scale=scaling, causal=causal,
            softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"),
            bias=kwargs.get("position_bias"),
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    own = eager_function(module)
    if own is None:
        raise ModelError(
            f"{type(module).__name__} was asked for attention weights (or dropout with "
            "soft-capping or sinks), which only its own attention function can give, and none was "
            "found in its file: expected eager_attention_forward beside its forward; leave "
            "output_attentions off, or detach mnemon first"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    added = _as_numbers(mask, query, key, causal)
    weighed: _Output = own(
        module, query, key, value, added, scaling=scaling, dropout=dropout, **kwargs
    )
    return weighed


def _traced() -> bool:
    """Whether this call is being recorded (compile, export, jit), not just carried out."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def _plain(kwargs: dict[str, Any]) -> bool:
    """Whether none of the extra arguments that bear meaning is there."""
    return (
        kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
        and kwargs.get("cache") is None
        and not _weights_wanted(kwargs)
    )


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this forward is to return attention weights.

    Newer models do not pass ``output_attentions`` on: they collect what modules return.
    """
    if kwargs.get("output_attentions"):
        return True
    return current.collects_attentions()


def _foldable(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the shapes are the ordinary ones; odd ones are left to torch's own broadcasting."""
    query_shape, key_shape = query.shape, key.shape
    if (
        len(query_shape) != 4
        or query_shape[0] != key_shape[0]
        or query_shape[1] % key_shape[1]
        or not key_shape[2]
    ):
        return False
    if mask is None:
        return True
    shape = mask.shape
    return (
        len(shape) == 4
        and shape[3] == key_shape[2]
        and (shape[1] == 1 or shape[1] == query_shape[1])
        and (shape[2] == 1 or shape[2] == query_shape[2])
    )


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _as_numbers(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A mask in the form that eager functions add to the scores."""
    if causal:
        num_new, num_tokens = query.shape[2], key.shape[2]
        mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
