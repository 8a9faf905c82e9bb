"""What transformers calls things around `generate` and `forward`: arguments, prompts, beams.

Nothing here knows caches: an object found under a cache argument is handed back as it is.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import GenerationMixin, PreTrainedModel

from mnemon.hf.versions import current

__all__ = [
    "CACHE_NAMES",
    "Prompt",
    "Stream",
    "announce_cached",
    "chunks_cached_again",
    "consumed_with_prompt",
    "feeds_cached_again",
    "forward_inputs",
    "is_plain_text",
    "named_arguments",
    "other_tensors",
    "placeholder_ids",
    "position_ids",
    "read_prompt",
    "setting",
    "stream",
    "supports_logits_to_keep",
    "wants_prompt_outputs",
]

# Most models take `past_key_values`, Mamba-type models `cache_params`.
CACHE_NAMES: Final = ("past_key_values", "cache_params")

# Tensors that say where tokens stand or how to continue, not what the cached tokens were.
_NOT_CONTENT: Final = frozenset(
    {
        "inputs",
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "mm_token_type_ids",
        "moe_mm_token_type_ids",
        "labels",
        "cache_position",
        "logits_to_keep",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Names under which a model's forward takes the tokens that its self-attention caches.

    Args:
        takes_own_mask: the mask covers the tokens of the forward only, not those cached before.
    """

    cache: str
    ids: str
    embeds: str
    mask: str
    positions: str
    takes_own_mask: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The prompt of one `generate` call, as its self-attention will see it.

    Args:
        ids: ``[batch, given]`` token ids; None when the call brings embeddings only.
        mask: ``[batch, num_tokens]``, 0 where padded.
        num_tokens: length of the whole prompt, tokens that the caller says are cached included.
        num_given: how many of them (the last ones) the call brings.
        batch_size: prompts given.
        expand: beams or returned sequences per prompt.
        unreadable: why the tokens cannot be known before the model runs; empty when they can.
    """

    ids: torch.Tensor | None
    mask: torch.Tensor
    num_tokens: int
    num_given: int
    batch_size: int
    expand: int
    unreadable: str = ""


def stream(model: PreTrainedModel) -> Stream:
    """The names `model` uses."""
    parameters = inspect.signature(model.forward).parameters
    has_params = CACHE_NAMES[1] in parameters and CACHE_NAMES[0] not in parameters
    cache = CACHE_NAMES[1] if has_params else CACHE_NAMES[0]
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    return Stream(
        cache=cache,
        ids=f"{prefix}input_ids",
        embeds=f"{prefix}inputs_embeds",
        mask=f"{prefix}attention_mask",
        positions=f"{prefix}position_ids",
        takes_own_mask=cache == CACHE_NAMES[1],
    )


def named_arguments(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Callable[..., Any],
) -> dict[str, Any]:
    """`args` and `kwargs` of `function` as one dict by parameter name.

    Args:
        method: the class's own (unbound) method that names them if `function` takes ``*args``.

    Raises:
        TypeError: more positional arguments than there are parameters, or one given twice.
    """
    if not args:
        return dict(kwargs)
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        parameters = list(inspect.signature(method).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    twice = [name for name in names[: len(args)] if name in kwargs]
    if len(args) > len(names) or twice:
        raise TypeError(
            f"{len(args)} positional arguments came for {names}"
            + (f", and {twice} also by name." if twice else ".")
        )
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def setting(model: PreTrainedModel, arguments: Mapping[str, Any], name: str, default: Any) -> Any:
    """A generation setting as `generate` will see it: argument, config object, model, default."""
    given = arguments.get("generation_config")
    for source in (arguments.get(name), getattr(given, name, None)):
        if source is not None:
            return source
    value = getattr(getattr(model, "generation_config", None), name, None)
    return default if value is None else value


def supports_logits_to_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def read_prompt(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Prompt:
    """The prompt of a `generate` call with `arguments` (by name, see `named_arguments`).

    Follows transformers' conventions: a missing mask is inferred from padding; a mask longer than
    the ids means that only new tokens were passed; an encoder-decoder's prompt begins with its
    start token.
    """
    names = stream(model)
    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    if model.config.is_encoder_decoder:
        ids, embeds = _decoder_ids(model, arguments), None
    else:
        ids, embeds = arguments.get("input_ids"), arguments.get(names.embeds)
        if ids is None and model.main_input_name == "input_ids":
            ids = arguments.get("inputs")
    expand = max(
        int(setting(model, arguments, "num_beams", 1)),
        int(setting(model, arguments, "num_return_sequences", 1)),
    )
    unreadable = _why_unreadable(model, arguments, ids)
    if embeds is not None:
        # With embeddings the ids, if any, only open the output; the embeddings are the prompt.
        same = ids is not None and ids.ndim == 2 and ids.shape[1] == embeds.shape[1]
        ids, shape = (ids if same else None), embeds.shape[:2]
    elif ids is None:
        ids = torch.full((1, 1), int(_first(setting(model, arguments, "bos_token_id", 0))))
        shape = ids.shape
    else:
        shape = ids.shape[:2] if ids.ndim > 1 else torch.Size((1, *ids.shape))
    mask = arguments.get(names.mask)
    if mask is None or mask.ndim != 2 or mask.shape[1] < shape[1] - 1:
        mask = _inferred_mask(model, arguments, ids, shape)
    elif mask.shape[1] == shape[1] - 1:  # the decoder's start token was put before the ids
        mask = torch.nn.functional.pad(mask, (1, 0), value=1)
    return Prompt(
        ids=None if unreadable else ids,
        mask=(mask != 0).long(),
        num_tokens=shape[1] if unreadable else max(mask.shape[1], shape[1]),
        num_given=shape[1],
        batch_size=shape[0],
        expand=expand,
        unreadable=unreadable,
    )


def other_tensors(model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors besides the prompt's tokens that decide what a cache holds.

    Pixels, audio features and the like; for an encoder-decoder also the encoder's input.
    """
    found: dict[str, torch.Tensor] = {}
    is_pair = model.config.is_encoder_decoder
    for name, value in arguments.items():
        if name.startswith("decoder_") or name in CACHE_NAMES:
            continue
        if name == "encoder_outputs" and value is not None:
            found[name] = value[0]
        elif isinstance(value, torch.Tensor) and (is_pair or name not in _NOT_CONTENT):
            # The same encoder input may be called `inputs` or by its own name.
            found[model.main_input_name if name == "inputs" else name] = value
    return found


def is_plain_text(model: PreTrainedModel, arguments: Mapping[str, Any], prompt: Prompt) -> bool:
    """Whether the prompt can be computed in pieces from ids and mask alone."""
    per_token = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
    return (
        not model.config.is_encoder_decoder
        and prompt.ids is not None
        and arguments.get("inputs_embeds") is None
        and all(arguments.get(name) is None for name in per_token)
        and not other_tensors(model, arguments)
    )


def wants_prompt_outputs(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Whether the caller asked for what the model computed on the way through the prompt."""
    names = ("output_attentions", "output_hidden_states")
    return any(setting(model, arguments, name, False) for name in names)


def consumed_with_prompt(names: Iterable[str]) -> bool:
    """Whether `generate` feeds all these inputs with the prompt only, never again."""
    return set(names) <= {*current.ONLY_WITH_PROMPT, "image_grid_thw"}


def feeds_cached_again(names: Stream) -> bool:
    """Whether `generate` may feed the whole prompt although a part of it is cached.

    It does when it drafts, and for recurrent models.
    """
    return current.FEEDS_CACHED_AGAIN or names.takes_own_mask


def chunks_cached_again() -> bool:
    """Whether `generate` with a ``prefill_chunk_size`` computes again what is cached."""
    return current.CHUNKS_CACHED_AGAIN


def announce_cached(arguments: dict[str, Any], prompt: Prompt, num_cached: int) -> None:
    """Make `generate` see that the first `num_cached` tokens of `prompt` are cached.

    Changes `arguments` where only the new tokens were passed and this release does not notice.
    """
    if prompt.num_given < prompt.num_tokens:
        current.announce_cached(arguments, num_cached, prompt.num_tokens)


def placeholder_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids that stand for pieces of an image, a video or a sound; empty if not declared."""
    config = model.config
    names = [
        f"{kind}_{suffix}"
        for kind in ("image", "video", "audio")
        for suffix in ("token_id", "token_index")
    ]
    values = (getattr(config, name, None) for name in names)
    return tuple(value for value in values if isinstance(value, int))


def position_ids(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Positions of the whole prompt as `generate` would compute them; None if not taken.

    Shape ``[batch, tokens]``, or with leading axes for models with several kinds of positions.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    own = getattr(model, "_prepare_position_ids_for_generation", None)
    if own is not None:
        return own(ids, {"attention_mask": mask})
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, current.PADDING_POSITION)


def forward_inputs(
    model: PreTrainedModel,
    cache: object,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    start: int,
    stop: int,
) -> dict[str, Any]:
    """Arguments of a forward over tokens ``[start, stop)`` of a prompt, after `start` cached ones.

    Args:
        ids: ``[batch, tokens]`` of the whole prompt.
        mask: ``[batch, tokens]``, or None when nothing is padded.
        positions: what `position_ids` gave.
    """
    names = stream(model)
    inputs: dict[str, Any] = {names.cache: cache, "use_cache": True}
    if mask is not None and "attention_mask" in inspect.signature(model.forward).parameters:
        # Attention wants the mask of all keys; a purely recurrent model the mask of what it reads.
        first = start if names.takes_own_mask else 0
        inputs["attention_mask"] = mask[:, first:stop]
    if positions is not None:
        inputs["position_ids"] = positions[..., start:stop]
    if supports_logits_to_keep(model):
        inputs["logits_to_keep"] = 1
    chunk = ids[:, start:stop]
    if isinstance(model, GenerationMixin):
        inputs = current.first_inputs(model, chunk, inputs, start, stop)
    else:
        inputs["input_ids"] = chunk
    return inputs | {"return_dict": True}


def _why_unreadable(
    model: PreTrainedModel, arguments: Mapping[str, Any], ids: torch.Tensor | None
) -> str:
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        return f"{type(model).__name__} has a generate of its own, which builds the prompt inside"
    if ids is not None and ids.ndim != 2:
        return f"the ids have shape {tuple(ids.shape)}, not [batch, tokens]"
    if setting(model, arguments, "token_healing", False):
        return "token_healing rewrites the end of the prompt"
    return ""


def _decoder_ids(model: PreTrainedModel, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The decoder prompt, start token included, as `generate` will build it."""
    ids: torch.Tensor | None = arguments.get("decoder_input_ids")
    if ids is None and model.main_input_name != "input_ids":
        ids = arguments.get("input_ids")
    start = setting(model, arguments, "decoder_start_token_id", None)
    start = setting(model, arguments, "bos_token_id", 0) if start is None else start
    batch_size = _encoder_batch(model, arguments) if ids is None else ids.shape[0]
    column = torch.as_tensor(start).reshape(-1, 1).expand(batch_size, 1)
    if ids is None:
        return column
    column = column.to(ids)
    keeps_its_start = "donut" in type(model).__name__.lower()
    if keeps_its_start or not bool((ids[:, :1] != column).all()):
        return ids
    return torch.cat([column, ids], dim=-1)


def _encoder_batch(model: PreTrainedModel, arguments: Mapping[str, Any]) -> int:
    for tensor in other_tensors(model, arguments).values():
        return int(tensor.shape[0])
    return 1


def _inferred_mask(
    model: PreTrainedModel,
    arguments: Mapping[str, Any],
    ids: torch.Tensor | None,
    shape: torch.Size,
) -> torch.Tensor:
    """The mask `generate` infers: pad tokens are padding, unless padding is the end token."""
    ones = torch.ones(tuple(shape), dtype=torch.long, device=None if ids is None else ids.device)
    pad = setting(model, arguments, "pad_token_id", None)
    if pad is None or ids is None or ids.ndim != 2 or model.config.is_encoder_decoder:
        return ones
    end = setting(model, arguments, "eos_token_id", None)
    ends = [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]
    return ones if int(pad) in ends else ids.ne(int(pad)).long()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value
