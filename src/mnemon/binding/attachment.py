"""`attach` and `detach`: one model instance learns to use mnemon caches to the full."""

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, final

import torch
from torch.compiler import is_compiling
from transformers import GenerationMixin, PreTrainedModel

from mnemon.binding import chunks
from mnemon.binding.calls import Call
from mnemon.binding.reuse import OnMismatch, Stats
from mnemon.binding.tracking import ATTACHED, brings_cache, own_cache, run_forward
from mnemon.errors import CacheError, ModelError
from mnemon.hf import attention as hf_attention
from mnemon.hf import generate as hf

__all__ = ["Attachment", "attach", "attachment_of", "detach"]


def attach(
    model: PreTrainedModel,
    *,
    on_mismatch: OnMismatch = "crop",
    exact: bool = False,
    chunk: int = chunks.DEFAULT_CHUNK,
    attention: bool = True,
) -> "Attachment":
    """Make `model` verify, reuse and track mnemon caches, and read them with mnemon's attention.

    Only this instance changes: its `forward` and `generate` become instance attributes and its
    attention implementation is switched. Everything else that is passed (transformers' own caches,
    streamers, assistants, generation configs) goes through untouched. A copy of an attached model
    (`copy.deepcopy`, pickle) is attached too, to itself.

    Args:
        model: a transformers model.
        on_mismatch: what `generate` does with a cache that holds other tokens than the prompt's:
            "crop" keeps the common prefix (a cache that cannot be cropped is emptied), "error"
            raises `PrefixMismatch`.
        exact: prefill in `generate` runs in fixed chunks (see `prefill`), so that generation after
            reuse is bit-identical to generation without it.
        chunk: tokens per chunk for `exact`, a power of two.
        attention: use mnemon's attention where it is exact for the model's layers.

    Returns:
        The attachment: `with mnemon.attach(model): ...` detaches on exit; `report()` and `stats`
        say what it does.

    Raises:
        ModelError: not a transformers model, attached already, or bad options.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"attach takes a transformers PreTrainedModel; got {type(model).__name__}. Attach to "
            f"the model inside a wrapper (for torch.compile: model._orig_mod)."
        )
    if attachment_of(model) is not None:
        raise ModelError(
            f"This {type(model).__name__} is attached already; call mnemon.detach(model) first."
        )
    if on_mismatch not in ("crop", "error"):
        raise ModelError(f"on_mismatch is 'crop' or 'error'; got {on_mismatch!r}.")
    return Attachment(
        model,
        on_mismatch=on_mismatch,
        exact=exact,
        chunk=chunks.checked_chunk(chunk),
        attention=attention,
    )


def detach(model: PreTrainedModel) -> None:
    """Undo `attach` completely: `model` is as it was before.

    Raises:
        ModelError: not attached, or somebody replaced `forward` or `generate` after `attach`.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ModelError(
            f"This {type(model).__name__} is not attached; there is nothing to detach."
        )
    attachment.detach()


def attachment_of(model: torch.nn.Module) -> "Attachment | None":
    """The attachment of `model`, if there is one."""
    found = vars(model).get(ATTACHED)
    return found if isinstance(found, Attachment) else None


@final
class Attachment:
    """What `attach` did to one model, and what happened since. Made by `attach` only.

    Args: those of `attach`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        on_mismatch: OnMismatch,
        exact: bool,
        chunk: int,
        attention: bool,
    ) -> None:
        self.model = model
        self.on_mismatch: OnMismatch = on_mismatch
        self.exact = exact
        self.chunk = chunk
        self.stats = Stats()
        self._names = hf.stream(model)
        self._calls: dict[int, Call] = {}
        self._saved = {name: vars(model).get(name) for name in ("forward", "generate")}
        self._restore = hf_attention.enable(model) if attention else None
        self._methods: dict[str, Any] = {"forward": _Method(model.forward, self._forward)}
        if isinstance(model, GenerationMixin):
            own: Callable[..., Any] = model.generate  # type: ignore[misc]  # its own `self` type
            self._methods["generate"] = _Method(own, self._generate)
        vars(model).update(self._methods)
        vars(model)[ATTACHED] = self

    def detach(self) -> None:
        """Undo the attachment; see `detach`."""
        attributes = vars(self.model)
        if attributes.get(ATTACHED) is not self:
            raise ModelError("This attachment was detached already.")
        for name, method in self._methods.items():
            if attributes.get(name) is not method:
                raise ModelError(
                    f"model.{name} was replaced after attach (by accelerate or another wrapper?); "
                    f"undo that first, then detach."
                )
        for name in self._methods:
            if self._saved[name] is None:
                del attributes[name]
            else:
                attributes[name] = self._saved[name]
        if self._restore is not None:
            self._restore.restore()
        del attributes[ATTACHED]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if vars(self.model).get(ATTACHED) is self:
            self.detach()

    # -- what the model calls ----------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        original = self._methods["forward"].original
        if is_compiling() or not brings_cache(args, kwargs):
            return original(*args, **kwargs)
        arguments = hf.named_arguments(original, args, kwargs, type(self.model).forward)
        cache = own_cache(arguments)
        if cache is None:
            return original(*args, **kwargs)
        call = self._calls.get(id(cache))
        if call is None:
            return run_forward(self.model, self._names, original, arguments, cache)
        call.skip_cached(arguments, self._names)
        mask = call.prompt.mask
        return run_forward(self.model, self._names, original, arguments, cache, mask)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        original = self._methods["generate"].original
        if not brings_cache(args, kwargs):
            return original(*args, **kwargs)
        arguments = hf.named_arguments(original, args, kwargs, GenerationMixin.generate)
        cache = own_cache(arguments)
        if cache is None or hf.setting(self.model, arguments, "use_cache", True) is False:
            return original(*args, **kwargs)
        if id(cache) in self._calls:
            raise CacheError(
                "This cache is in use by another generate call of this model; one cache serves one "
                "call at a time. Use cache.fork() for the second."
            )
        self.stats.calls += 1
        call = self._calls[id(cache)] = Call(
            model=self.model,
            cache=cache,
            arguments=arguments,
            prompt=hf.read_prompt(self.model, arguments),
            on_mismatch=self.on_mismatch,
            exact_chunk=self.chunk if self.exact else None,
            stats=self.stats,
        )
        try:
            call.prepare()
            result = original(**arguments)
            call.name_unlogged(result)
            return result
        finally:
            del self._calls[id(cache)]
            # Assisted decoding leaves windows recording: from here on they are bounded again.
            cache.end_past_recording()

    # -- what it says ------------------------------------------------------------------------------

    def report(self) -> str:
        """What is attached, which modules use mnemon's attention, and what reuse saved."""
        exact = f", exact (chunks of {self.chunk} tokens)" if self.exact else ""
        lines = [f"{self!r}, on_mismatch={self.on_mismatch!r}{exact}", *self._attention_lines()]
        stats = self.stats
        lines.append(
            f"{stats.calls} generate calls with a cache: {stats.tokens_reused} prompt tokens "
            f"reused, {stats.tokens_computed} computed ({stats.tokens_recomputed} of them again), "
            f"{stats.tokens_cropped} cropped, {stats.resets} resets"
        )
        if stats.tokens_unverified:
            lines.append(
                f"{stats.tokens_unverified} reused tokens could not be verified (embeddings, or "
                f"cached without their ids)"
            )
        return "\n".join(lines)

    def _attention_lines(self) -> list[str]:
        if self._restore is None:
            return ["attention: the model's own"]
        alone = self._restore.left_alone
        lines = [f"attention: mnemon's in {len(self._restore.served)} modules"]
        for reason in sorted(set(alone.values())):
            names = [name for name, why in alone.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"attention: the model's own in {names[0]}{more}: {reason}")
        return lines

    def __repr__(self) -> str:
        state = "attached" if vars(self.model).get(ATTACHED) is self else "detached"
        return f"Attachment({type(self.model).__name__}, {state})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy in another process: the names that its config uses have to exist there.
        vars(self).update(state)
        hf_attention.register()


class _Method:
    """A callable that stands in for `original` on the instance and shows its signature.

    An object, not a closure: copies and pickles of the model refer to themselves, not to us.
    """

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        self.original = original
        self.replacement = replacement

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(*args, **kwargs)
