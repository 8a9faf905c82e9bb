"""One transformer with a method on it: its patches, its sessions, and what a call of it does."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnemon.diffusion.clock import Clock, Key
from mnemon.diffusion.hidden import BlockCall, Ports
from mnemon.diffusion.listening import Branches, listen_to
from mnemon.diffusion.methods.base import Method, Session
from mnemon.diffusion.outputs import nbytes, tensors
from mnemon.diffusion.patching import Interceptor
from mnemon.diffusion.report import Tally
from mnemon.diffusion.sites import Sites, find_sites
from mnemon.errors import DiffusionError

__all__ = ["ATTRIBUTE", "AttachedModel", "Mark"]

ATTRIBUTE = "_mnemon_diffusion"
_TIMES = ("timestep", "timesteps", "t", "sigma")
# What tells guidance branches apart; other inputs (a ControlNet's) may change with every step.
_CONDITIONS = ("encoder_hidden_states", "class_labels", "pooled_projections")
_ASCENDING = (
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "OmniGenTransformer2DModel",
    "ZImageTransformer2DModel",
)


class AttachedModel:
    """One transformer with a method on it."""

    def __init__(self, name: str, module: nn.Module, method: Method) -> None:
        self.name, self.method = name, method
        self.outer = module
        self.inner: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        if getattr(self.inner, ATTRIBUTE, None) is not None:
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
        self._branch = ""
        self._thread: int | None = None
        # In a key's first evaluation: how often each part ran.
        self._called: list[int] | None = None
        self._blocks_called: list[int] = []
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
        object.__setattr__(self.inner, ATTRIBUTE, Mark(self))
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
            self._set(self.inner, "cache_context", Branches(self.inner, self.name_branch))

    def _listen_to(self, scheduler: Any) -> None:
        if not hasattr(scheduler, "set_timesteps"):
            return
        self.method.check_sampler(type(scheduler).__name__)
        self._undo.append(listen_to(scheduler, self.begin_run))

    def begin_run(self, scheduler: str, timesteps: Sequence[float] | None) -> None:
        """A scheduler of this class has set its timesteps; None: it does not say which."""
        self.method.check_sampler(scheduler)
        self.reset()
        if timesteps is not None:
            self.clock.announce(timesteps)

    def name_branch(self, name: str) -> str:
        """The guidance branch of the calls that follow; returns the one before."""
        before, self._branch = self._branch, name
        return before

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
        if ATTRIBUTE in vars(self.inner):
            object.__delattr__(self.inner, ATTRIBUTE)
        self.reset()

    def reset(self) -> None:
        """Forgets all features; the next call is the first of a run."""
        self.session = None
        self._forget()
        self.clock.start()

    def _forget(self) -> None:
        self._sessions.clear()
        self._shapes.clear()
        self._conditions.clear()

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
                self._check_calls()
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
        branch = self._branch
        begins, key, step = self.clock.tick(timestep, branch, hidden)
        if begins:
            self._forget()  # before branches are compared: another run has other prompts
        condition = tuple(named.get(name) for name in _CONDITIONS)
        other = self._key_of(key, condition)
        if other != key:
            key, step = other, self.clock.instead(key, other)
        shape = tuple((t.shape, t.dtype, t.device) for t in tensors((args, kwargs)))
        if self._shapes.get(key, shape) != shape:
            # Another batch or another size within what looked like one run: it is another run.
            self.clock.start()
            begins, key, step = self.clock.tick(timestep, branch, hidden)
            self._forget()
        if not begins and not self.clock.settled:
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
            raise self._outside()
        if self._called is not None:
            self._called[number] += 1
        return session.sublayer(number, original, args, kwargs)

    def _block(
        self, index: int, ports: Ports, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        session = self.session
        if session is None:
            raise self._outside()
        if self._called is not None:
            self._blocks_called[index] += 1
        return session.block(index, BlockCall(ports, original, args, kwargs))

    def _probe(self, number: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self.session is not None:
            self.session.probe(number, output)
        return output

    def _outside(self) -> DiffusionError:
        """What to say of a part that is called while the transformer's own call is not here."""
        return DiffusionError(
            f"a part of this {self.sites.model} ran outside of the transformer's forward as it was "
            "attached, so the cache is out of work: its forward was replaced since (offloading "
            "hooks: attach before enabling them), gradient checkpointing runs it again, or it was "
            "called by hand; call mnemon.diffusion.detach(model) to go on without a cache"
        )

    def _check_calls(self) -> None:
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


class Mark:
    """What a model carries to say that it is attached; copies of the model do not."""

    def __init__(self, model: AttachedModel) -> None:
        self.model = model
        self.detach: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None
