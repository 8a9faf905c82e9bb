"""`attach` and `detach`: a caching method on one model, and nothing else changed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from mnemon.diffusion.clock import Clock, Key
from mnemon.diffusion.hidden import BlockCall, Ports
from mnemon.diffusion.methods.base import Method, Session
from mnemon.diffusion.methods.registry import make_method
from mnemon.diffusion.outputs import nbytes, tensors
from mnemon.diffusion.patching import Interceptor
from mnemon.diffusion.report import Report, Tally
from mnemon.diffusion.sites import Sites, find_sites
from mnemon.errors import DiffusionError

__all__ = ["Attachment", "attach", "detach"]

_ATTRIBUTE = "_mnemon_diffusion"
_TIMES = ("timestep", "timesteps", "t", "sigma")
# What tells guidance branches apart; other inputs (a ControlNet's) may change with every step.
_CONDITIONS = ("encoder_hidden_states", "class_labels", "pooled_projections")
# Of a pipeline; a second transformer works on the later, less noisy timesteps (Wan 2.2).
_COMPONENTS = ("transformer", "transformer_2")
_ASCENDING = (
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "OmniGenTransformer2DModel",
    "ZImageTransformer2DModel",
)


class _Model:
    """One transformer with a method on it."""

    def __init__(self, name: str, module: nn.Module, method: Method) -> None:
        self.name, self.method = name, method
        self.outer = module
        self.inner: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        if getattr(self.inner, _ATTRIBUTE, None) is not None:
            raise DiffusionError(
                f"a cache is attached to this {type(self.inner).__name__} already; call "
                "mnemon.diffusion.detach(model) first"
            )
        if getattr(self.inner, "is_cache_enabled", False):
            raise DiffusionError(
                f"one of diffusers' own caches is enabled on this {type(self.inner).__name__}, and "
                "the errors of two would add up; call transformer.disable_cache() first"
            )
        self.sites: Sites = find_sites(self.inner)
        method.check(self.sites)
        if "block" in method.levels and not all(stack.returns for stack in self.sites.stacks):
            raise DiffusionError(
                f"{method.name} leaves out blocks, but how {self.sites.model} passes hidden states "
                "between its blocks is not known; use a method at the level of sublayers, such as "
                "interval or taylor"
            )
        self._parameters = list(inspect.signature(type(self.inner).forward).parameters)[1:]
        self._time = next((name for name in _TIMES if name in self._parameters), "")
        if not self._time:
            raise DiffusionError(
                f"{self.sites.model}.forward takes {', '.join(self._parameters)}: none of "
                f"{', '.join(_TIMES)} is among them, and runs are told apart by it"
            )
        self.tally = Tally(self.sites)
        self.clock = Clock(ascending=self.sites.model in _ASCENDING)
        self.session: Session | None = None
        self._sessions: dict[Key, Session] = {}
        self._shapes: dict[Key, tuple[Any, ...]] = {}
        self._conditions: dict[Key, tuple[Any, ...]] = {}
        self._bypassed = False
        self.branch = ""
        self._thread: int | None = None
        self._called: list[int] | None = None  # by sublayer, in the first evaluation of a run
        self._patches: list[Interceptor] = []
        self._undo: list[Callable[[], None]] = []

    # -- patching ----------------------------------------------------------------------------------

    def install(self, scheduler: Any) -> None:
        """Patches the instances; whatever fails leaves none of them patched."""
        try:
            self._install(scheduler)
        except BaseException:
            self.remove()
            raise

    def _install(self, scheduler: Any) -> None:
        object.__setattr__(self.inner, _ATTRIBUTE, _Mark(self))
        if "sublayer" in self.method.levels:
            for number, sublayer in enumerate(self.sites.sublayers):
                handler = functools.partial(self._sublayer, number)
                self._patch(self.inner.get_submodule(sublayer.path), handler)
        if "block" in self.method.levels:
            for stack in self.sites.stacks:
                ports = Ports(stack, self.inner.get_submodule(stack.blocks[0].path))
                for block in stack.blocks:
                    handler = functools.partial(self._block, block.index, ports)
                    self._patch(self.inner.get_submodule(block.path), handler)
        for number, path in enumerate(self.method.probes(self.inner, self.sites)):
            self._patch(self.inner.get_submodule(path), functools.partial(self._probe, number))
        self._patch(self.outer, self._forward)
        self._listen_to_branches()
        if scheduler is not None:
            self._listen_to(scheduler)

    def _patch(self, module: nn.Module, handler: Any) -> None:
        self._patches.append(Interceptor(module, handler))

    def _listen_to_branches(self) -> None:
        """Pipelines name the branch: ``with transformer.cache_context("cond")``."""
        if getattr(self.inner, "cache_context", None) is not None:
            self._set(self.inner, "cache_context", _Branches(self))

    def _listen_to(self, scheduler: Any) -> None:
        if not hasattr(scheduler, "set_timesteps"):
            return
        found = vars(scheduler).get("set_timesteps")
        announcer = found if isinstance(found, _Announcer) else _Announcer(scheduler)
        self.method.check_sampler(type(scheduler).__name__)
        announcer.listeners.append(self)
        self._undo.append(functools.partial(announcer.forget, self))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name)
        object.__setattr__(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # somebody else wrapped it since: theirs stays, and ours only passes on
            if before is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)

        self._undo.append(undo)

    def remove(self) -> None:
        """Undoes `install`."""
        for patch in reversed(self._patches):
            patch.remove()
        for undo in reversed(self._undo):
            undo()
        self._patches, self._undo = [], []
        if _ATTRIBUTE in vars(self.inner):
            object.__delattr__(self.inner, _ATTRIBUTE)
        self.reset()

    def reset(self) -> None:
        """Forgets all features; the next call is the first of a run."""
        self.session = None
        self._sessions.clear()
        self._shapes.clear()
        self._conditions.clear()
        self.clock.start()

    @property
    def nbytes(self) -> int:
        """Bytes of features kept now."""
        return nbytes(value for session in self._sessions.values() for value in session.held())

    # -- calls -------------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._enter()
        try:
            session = self._begin(args, kwargs)
            started = time.perf_counter()
            result = session.answer(original(*args, **kwargs), _first_tensor(args, kwargs))
            session.end()
            # On an accelerator this is the time to issue the work, until something waits for it.
            self.tally.add(session.computed, session.ran, time.perf_counter() - started)
            if self._called is not None:
                self._check_calls(session)
        except BaseException:
            self.reset()  # half-written features must not be reused
            raise
        finally:
            self.session = self._thread = None
        self.tally.held(self.nbytes)
        return result

    def _enter(self) -> None:
        if self._thread is not None:
            raise DiffusionError(
                f"this {self.sites.model} is being called from "
                + ("another thread" if self._thread != threading.get_ident() else "within itself")
                + "; a cache follows one run at a time: give every thread a model of its own"
            )
        self._thread = threading.get_ident()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Session:
        named = dict(zip(self._parameters, args, strict=False)) | kwargs
        moment = named.get(self._time)
        if moment is None:
            raise DiffusionError(f"{self.sites.model} was called without {self._time}")
        # Some pipelines give every token a timestep: those that are kept clean have 0.
        timestep = float(moment.max()) if isinstance(moment, Tensor) else float(moment)
        hidden = _first_tensor(args, kwargs)
        branch = self.branch
        begins, key, step = self.clock.tick(timestep, branch, hidden)
        condition = tuple(named.get(name) for name in _CONDITIONS)
        other = self._key_of(key, condition)
        if other != key:
            key, step = other, self.clock.instead(key, other)
        shape = tuple((t.shape, t.dtype, t.device) for t in tensors((args, kwargs)))
        if self._shapes.get(key, shape) != shape:
            # Another batch or another size within what looked like one run: it is another run.
            self.clock.start()
            begins, key, step = self.clock.tick(timestep, branch, hidden)
        if begins:
            self._sessions.clear()
            self._shapes.clear()
            self._conditions.clear()
        elif not self.clock.settled:
            self._sessions.pop(key, None)
        session = self._sessions.get(key)
        if session is None:
            self._called = [0] * len(self.sites.sublayers)
            self._blocks_called = [0] * len(self.sites.blocks)
            session = self._sessions[key] = self.method.session(self.sites, self.inner)
            step = step.first()
            self.clock.restart(key)
        self._shapes[key], self._conditions[key] = shape, condition
        self.tally.begin(begins, self.inner, named, shape)
        session.computed = [0.0] * len(self.sites.sublayers)
        session.ran = [1.0] * len(self.sites.blocks)
        session.begin(step)
        self.session = session
        return session

    def _key_of(self, key: Key, condition: tuple[Any, ...]) -> Key:
        """The key whose features this call may use: same branch, same conditioning.

        Where nobody names branches they are told apart by their order, and one that drops out in
        mid-run (guidance for a part of the steps) would leave its place to the other.
        """
        known = self._conditions.get(key)
        if known is None or _alike(known, condition):
            return key
        for other, value in self._conditions.items():
            if other.branch == key.branch and _alike(value, condition):
                return other
        self._sessions.pop(key, None)  # another prompt: nothing kept is of use
        return key

    def _sublayer(self, number: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        session = self.session
        if session is None:
            return self._outside(original, args, kwargs)
        if self._called is not None:
            self._called[number] += 1
        return session.sublayer(number, original, args, kwargs)

    def _block(
        self, index: int, ports: Ports, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        session = self.session
        if session is None:
            return self._outside(original, args, kwargs)
        if self._called is not None:
            self._blocks_called[index] += 1
        return session.block(index, BlockCall(ports, original, args, kwargs))

    def _probe(self, number: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self.session is not None:
            self.session.probe(number, output)
        return output

    def _outside(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A part is called, but the transformer's own call did not come through here."""
        if self._bypassed:
            return original(*args, **kwargs)
        raise DiffusionError(
            f"a part of this {self.sites.model} ran outside of the transformer's forward as it was "
            "attached, so the cache is out of work: its forward was replaced since (offloading "
            "hooks: attach before enabling them), gradient checkpointing runs it again, or it was "
            "called by hand; call mnemon.diffusion.detach(model) to go on without a cache"
        )

    def _check_calls(self, session: Session) -> None:
        """After a key's first evaluation, which computes everything: each part ran once."""
        called, self._called = self._called, None
        if "block" in self.method.levels:
            for count, block in zip(self._blocks_called, self.sites.blocks, strict=True):
                if count != 1:
                    raise DiffusionError(
                        f"{block.path} ran {count} times in one evaluation of {self.sites.model} "
                        f"(skip_layers?); {self.method.name} stands for stretches of blocks and "
                        "needs all of them, use a method at the level of sublayers"
                    )
        if "sublayer" not in self.method.levels or called is None:
            return
        for count, sublayer in zip(called, self.sites.sublayers, strict=True):
            if count > 1:
                raise DiffusionError(
                    f"{sublayer.path} ran {count} times in one evaluation of {self.sites.model}; "
                    "what it returned last is not what it would return each time (is feed-forward "
                    "chunking on?)"
                )


def _alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    for a, b in zip(one, other, strict=True):
        if a is b:
            continue
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            return False
    return True


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """The latents: what every transformer takes first."""
    found = next(tensors(args), None)
    return next(tensors(kwargs), None) if found is None else found


class _Branches:
    """Stands for a model's `cache_context`, and notes the names it is given."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._original: Any = model.inner.cache_context

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        model = self._model
        before, model.branch = model.branch, name
        try:
            with self._original(name, *args, **kwargs):
                yield
        finally:
            model.branch = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._model.inner)]
        return type(copied).cache_context.__get__(copied)


class _Announcer:
    """Stands for a scheduler's `set_timesteps`, and tells models of the runs that begin with it.

    Schedulers are shared between pipelines: each model takes itself off the list, and the last one
    gives the scheduler back.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._original = scheduler.set_timesteps
        self._own = "set_timesteps" in vars(scheduler)
        self.listeners: list[_Model] = []
        functools.update_wrapper(self, self._original, updated=())
        scheduler.set_timesteps = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        found = getattr(self._scheduler, "timesteps", None)
        for model in self.listeners:
            model.method.check_sampler(type(self._scheduler).__name__)
            model.reset()
            if isinstance(found, Tensor):
                model.clock.announce(found.flatten().tolist())
        return result

    def forget(self, model: _Model) -> None:
        """`model` was detached."""
        self.listeners.remove(model)
        if not self.listeners and vars(self._scheduler).get("set_timesteps") is self:
            if self._own:
                self._scheduler.set_timesteps = self._original
            else:
                del self._scheduler.set_timesteps

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._scheduler)]
        return type(copied).set_timesteps.__get__(copied)


class _Mark:
    """What a model carries to say that it is attached; copies of the model do not."""

    def __init__(self, model: _Model) -> None:
        self.model = model
        self.attachment: Attachment | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class Attachment:
    """A method attached to the transformers of one pipeline; also a context manager.

    Attributes:
        method: the method with its options.
    """

    def __init__(self, models: list[_Model], method: Method, scheduler: Any) -> None:
        self.method = method
        self._models = models
        done: list[_Model] = []
        try:
            for model in models:
                model.install(scheduler)
                done.append(model)
                vars(model.inner)[_ATTRIBUTE].attachment = self
        except BaseException:
            for model in done:
                model.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def sites(self) -> Sites:
        """Where the (first) transformer is attached to."""
        return self._models[0].sites

    @property
    def nbytes(self) -> int:
        """Bytes of features kept at this moment."""
        return sum(model.nbytes for model in self._models)

    def report(self) -> Report:
        """What was computed, what reused, since `attach` or the last `clear_report`."""
        return Report(
            method=self.method, tallies={model.name: model.tally for model in self._models}
        )

    def longest_run(self) -> int:
        """Evaluations of one key in the latest run, of the key that had most."""
        return max(model.clock.longest for model in self._models)

    def clear_report(self) -> None:
        """Counts from zero."""
        for model in self._models:
            model.tally = Tally(model.sites)

    def reset(self) -> None:
        """Forgets all features: what follows is another run.

        Needed only without a pipeline: where a run stops after its very first step and is begun
        again with the same input, where runs are interleaved out of step, and between runs of a
        single step, which look like further evaluations at one timestep.
        """
        for model in self._models:
            model.reset()

    def detach(self) -> None:
        """Gives the models back as they were; a second call does nothing."""
        for model in reversed(self._models):
            model.remove()


def attach(target: Any, method: str | Method, **options: Any) -> Attachment:
    """Puts a caching method on a diffusers pipeline or a transformer.

        with mnemon.diffusion.attach(pipe, "taylor", order=1, interval=3) as cached:
            images = pipe(...).images
        print(cached.report())

    Only this instance changes, until `detach`. Features are kept by guidance branch and by
    evaluation within a timestep, and dropped when another run, another shape or an error comes.
    Nobody has to say how many steps there are.

    Args:
        target: a pipeline with a `transformer` (its scheduler then says where runs begin), or a
            transformer alone.
        method: a name, a text such as ``"interval(interval=3)"``, or a `Method`.
        options: the method's.

    Raises:
        NoSites: the model has no blocks with the usual names.
        DiffusionError: attached already, no such method, a bad option, or one that this model
            cannot serve.
    """
    chosen = make_method(method, **options)
    if isinstance(target, nn.Module):
        models = [_Model("transformer", target, chosen)]
        return Attachment(models, chosen, None)
    found = {name: getattr(target, name, None) for name in _COMPONENTS}
    models = [_Model(n, m, chosen) for n, m in found.items() if isinstance(m, nn.Module)]
    if len(models) > 1 and chosen.made_for_one:
        raise DiffusionError(
            f"this {type(target).__name__} has {len(models)} transformers, and {chosen.name} was "
            "made for the steps of one; attach it to each by itself, with what was made for it"
        )
    if not models:
        raise DiffusionError(
            f"a {type(target).__name__} came; a pipeline with a transformer, or a transformer "
            "(torch.nn.Module), was expected"
            + (". UNets are not served" if getattr(target, "unet", None) is not None else "")
        )
    return Attachment(models, chosen, getattr(target, "scheduler", None))


def detach(target: Any) -> None:
    """Takes the method off a pipeline or a transformer; one that has none is left as it is."""
    parts = (
        [target]
        if isinstance(target, nn.Module)
        else [getattr(target, name, None) for name in _COMPONENTS]
    )
    for part in parts:
        mark = getattr(getattr(part, "_orig_mod", part), _ATTRIBUTE, None)
        if mark is not None and mark.attachment is not None:
            mark.attachment.detach()


@torch.no_grad()
def uncached(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls an attached transformer as if it were not: nothing is reused, kept or counted."""
    mark = getattr(model, _ATTRIBUTE, None)
    if mark is None or not mark.model._patches:
        return model(*args, **kwargs)
    inner: _Model = mark.model
    inner._bypassed = True
    try:
        return inner._patches[-1]._original(*args, **kwargs)
    finally:
        inner._bypassed = False
