"""What transformers calls while a model is traced: attention and masks without shortcuts.

transformers leaves a mask out where it finds that causality says the same, and what it finds
depends on the numbers of the sample: the mask then vanishes from the graph, or a length becomes a
constant. Inside `traceable` every mask is built, from shapes alone, aligned at the newest token;
attention reads it and never repeats keys for the heads of a group.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutput

from mnemon.hf.masks import ATTENTION_NAME, EAGER_NAME

__all__ = [
    "FORGETS",
    "BaseModelOutput",
    "DynamicCache",
    "EncoderDecoderCache",
    "StaticCache",
    "cache_argument",
    "cache_utils",
    "graph_attention",
    "graph_mask",
    "num_positions",
    "sampling_warpers",
    "takes",
    "traceable",
    "untraceable_modules",
    "vocabulary_size",
]

#: A layer's `kv_offset` in a graph: older tokens may be gone, nobody counts how many.
FORGETS = -1

#: The tables are the process's: one model is traced at a time.
_LOCK = threading.RLock()

_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
_BOOL_MASKS = ("sdpa", ATTENTION_NAME)
_ADDED_MASKS = ("eager", EAGER_NAME)


def graph_attention(
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
) -> tuple[Tensor, None]:
    """Attention under the conventions of transformers' "sdpa" function, in plain operators.

    The query heads of a group are rows of one product, so keys and values are read as they lie. A
    row that sees nothing (left padding) gives zeros, as torch's own function does.

    Args:
        module: the attention module that calls.
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, tokens, head_dim].
        value: [batch, kv_heads, tokens, value_dim].
        attention_mask: bool or additive, [batch or 1, heads or 1, new, tokens]; None is causal for
            a causal module, else no mask.
        scaling: factor of the scores; 1 / sqrt(head_dim) if None.
        is_causal: overrides the module's own.
        position_bias: added to the scores, [batch or 1, heads, new, tokens].

    Returns:
        [batch, new, heads, value_dim], and None for weights.
    """
    batch, heads, num_new, head_dim = query.shape
    kv_heads, num_tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scale = head_dim**-0.5 if scaling is None else scaling
    rows = _copied(query * scale).view(batch * kv_heads, group * num_new, head_dim)
    columns = key.reshape(batch * kv_heads, num_tokens, head_dim).transpose(1, 2)
    scores = torch.bmm(rows, columns).float().view(batch, heads, num_new, num_tokens)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        new = torch.arange(num_new, device=query.device)[:, None] + (num_tokens - num_new)
        attention_mask = torch.arange(num_tokens, device=query.device)[None, :] <= new
    if position_bias is not None:
        scores = scores + _with_bias(position_bias.float(), attention_mask)
        weights = torch.softmax(scores, dim=-1)
    elif attention_mask is None:
        weights = torch.softmax(scores, dim=-1)
    elif attention_mask.dtype == torch.bool:
        hidden = torch.logical_not(attention_mask)
        scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    else:
        weights = torch.softmax(scores + attention_mask, dim=-1)
    value_dim = value.shape[-1]
    rows = weights.to(value.dtype).view(batch * kv_heads, group * num_new, num_tokens)
    out = torch.bmm(rows, value.reshape(batch * kv_heads, num_tokens, value_dim))
    return _copied(out.view(batch, heads, num_new, value_dim).transpose(1, 2)), None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A mask as numbers, into the bias; as transformers does it, rows that see nothing included."""
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    return bias.masked_fill(torch.logical_not(mask), torch.finfo(torch.float32).min)


def _copied(x: Tensor) -> Tensor:
    """`x` in one piece. Asking whether it is already would make the answer part of the graph."""
    return x.clone(memory_format=torch.contiguous_format)


def graph_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """A bool mask [batch, 1, q_length, kv_length] in any case, from shapes alone.

    The mask of padding, the keys and the queries end with the same token; counted from there, a
    window needs no number of the tokens that it forgot. Its layers say so by a negative offset.
    """
    assert mask_function is not None
    forgets = kv_offset == FORGETS
    if attention_mask is not None and forgets:
        first_key = attention_mask.shape[-1] - kv_length
        first_query = attention_mask.shape[-1] - q_length
    else:
        first_key = 0 if forgets else kv_offset
        first_query = q_offset
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros(1, dtype=torch.int64, device=device)[:, None, None, None]
    queries = (torch.arange(q_length, device=device) + first_query)[:, None]
    keys = (torch.arange(kv_length, device=device) + first_key)[None, :]
    mask = mask_function(rows, heads, queries, keys)
    if attention_mask is not None:
        known = attention_mask.to(torch.bool)
        if forgets:  # picked, not sliced: a slice asks where it begins
            known = known.index_select(1, keys[0])
        mask = mask & known[:, None, None, :]
    return mask.expand(batch_size, 1, q_length, kv_length)


def _added_mask(dtype: torch.dtype = torch.float32, **sizes: Any) -> Tensor:
    mask = graph_mask(**sizes)
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), hidden)


@contextmanager
def traceable(*, plain_experts: bool = False) -> Iterator[None]:
    """While open, every mask is built and "sdpa" is plain operators; afterwards nothing remains.

    Args:
        plain_experts: mixtures of experts pick weights per token (more memory for long prompts)
            instead of calling an operator that torch alone has.
    """
    attention = AttentionInterface._global_mapping
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    experts = _experts_functions()
    changed: list[tuple[dict[str, Any], str, Any]] = []

    def put(mapping: dict[str, Any], name: str, value: Any) -> None:
        changed.append((mapping, name, mapping.get(name)))
        mapping[name] = value

    _LOCK.acquire()
    try:
        if plain_experts and "batched_mm" in experts:
            put(experts, "grouped_mm", experts["batched_mm"])
        for name in _BOOL_MASKS:
            put(attention, name, graph_attention)
            put(masks, name, graph_mask)
        for name in _ADDED_MASKS:
            put(masks, name, _added_mask)
        yield
    finally:
        for mapping, name, value in reversed(changed):
            if value is None:
                mapping.pop(name, None)
            else:
                mapping[name] = value
        _LOCK.release()


def _experts_functions() -> dict[str, Any]:
    """transformers' table of ways to run experts; empty in releases without one."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return {}
    mapping: dict[str, Any] = ALL_EXPERTS_FUNCTIONS._global_mapping
    return mapping


def untraceable_modules(model: PreTrainedModel) -> list[str]:
    """Implementations of attention in `model` that cannot be traced (flash attention and kin)."""
    known = {*_BOOL_MASKS, *_ADDED_MASKS, None}
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    names = (getattr(config, "_attn_implementation", None) for config in configs.values())
    return sorted({str(name) for name in names if name not in known})


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model's table of positions has room for; None without a table."""
    found = [
        part.num_embeddings - int(getattr(part, "offset", 0))
        for name, part in model.named_modules()
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(part, nn.Embedding)
    ]
    return min(found, default=None)


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Ids that a model's text decoder knows; None where its config does not say."""
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else None


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    import inspect

    return argument in inspect.signature(model.forward).parameters


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache."""
    return "past_key_values" if takes(model, "past_key_values") else "cache_params"


def sampling_warpers(
    temperature: float, top_k: int | None, top_p: float | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """What `generate` does to scores before it draws: (ids, scores) to scores."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return cast(Callable[[Tensor, Tensor], Tensor], warpers)
