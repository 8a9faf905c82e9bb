"""Token-wise caching: ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911).

full          everything is computed; outputs, scores and counters are kept
conservative  attentions are reused; of every MLP's tokens, the ones that score highest are
              computed and put among the kept outputs
aggressive    no block runs; the last block's output is reused (DuCa)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mnemon.diffusion.clock import Step
from mnemon.diffusion.hidden import BlockCall
from mnemon.diffusion.methods.base import Level, Method, Session
from mnemon.diffusion.methods.options import at_least, between, one_of
from mnemon.diffusion.methods.scores import (
    AttentionTap,
    attention_received,
    emphasise,
    value_norm_score,
)
from mnemon.diffusion.outputs import Output
from mnemon.diffusion.sites import Sites
from mnemon.errors import DiffusionError

__all__ = ["DuCa", "StepKind", "ToCa", "kind_of_step", "next_interval", "token_ratio"]

SCORES = ("value_norm", "attention", "random")
_CONTEXT = ("ff_context", "txt_mlp")  # the MLPs of text tokens, whose values come from add_v_proj


class StepKind(Enum):
    """What a step computes."""

    FULL = "full"
    CONSERVATIVE = "conservative"
    AGGRESSIVE = "aggressive"


def next_interval(interval: int, left: int, total: int, *, forced: bool = True) -> int:
    """The distance between full steps that holds from a full step on, `left` steps before the end.

    Args:
        interval: the method's; 1 stays 1.
        forced: 2 in the fifth that begins when two fifths are left; False where no token is
            computed anew (then the interval is constant, as in FORA).
    """
    if interval == 1 or not forced:
        return interval
    if 0.2 * total <= left < 0.4 * total:
        return 2
    return max(1, round(interval / (1 + 0.4 - 0.8 * left / total)))


def kind_of_step(left: int, interval: int, *, first: bool, aggressive: bool) -> StepKind:
    """What the step does after which `left` others come."""
    if first or left % interval == 0:
        return StepKind.FULL
    if not aggressive or left % interval % 2:
        return StepKind.CONSERVATIVE
    return StepKind.AGGRESSIVE


def token_ratio(ratio: float, left: int, total: int, layer: int, layers: int) -> float:
    """The share of an MLP's tokens that a conservative step computes, 0 to 1."""
    by_step = 1 + 2 - 4 * left / total
    by_layer = 0.8 + 0.4 * layer / max(1, layers - 1)
    return min(1.0, max(0.0, ratio * by_step * by_layer * 2.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToCa(Method):
    """Between full steps, computes the MLPs of the tokens that matter most.

    Args:
        interval: between full steps, before it is adapted to where in a run they are.
        ratio: of tokens, before it is adapted to step and layer.
        score: "value_norm" (no attention map is ever formed), "attention" (what a token receives;
            256 rows of the map exist at a time) or "random".
        bonus: for the highest score in each 2 x 2 patch.
        seed: of the random scores. They do not depend on the sample: both halves of a guided batch,
            and both branches, choose the same tokens.

    Source: ToCa (arXiv 2410.05317).
    """

    name: ClassVar[str] = "toca"
    aggressive: ClassVar[bool] = False
    interval: int = 3
    ratio: float = 0.1
    score: str = "value_norm"
    bonus: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("interval", self.interval, 1)
        between("ratio", self.ratio, 0, 1)
        one_of("score", self.score, SCORES)
        between("bonus", self.bonus, 0)
        at_least("seed", self.seed, 0)

    @property
    def levels(self) -> Sequence[Level]:
        return ("sublayer", "block") if self.aggressive else ("sublayer",)

    def check(self, sites: Sites) -> None:
        if not any(s.per_token for s in sites.sublayers):
            raise DiffusionError(
                f"{self.name} computes MLPs for some of the tokens, and {sites.model} has none "
                "that is known to treat tokens alone; use interval or taylor"
            )

    def probes(self, model: nn.Module, sites: Sites) -> Sequence[str]:
        if self.score == "random":
            return ()
        return list(dict.fromkeys(_probe_paths(model, sites).values()))

    def session(self, sites: Sites, model: nn.Module) -> Session:
        return _TokenSession(sites, model, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DuCa(ToCa):
    """ToCa, with every other step between full ones answered by the last block's output.

    Source: DuCa (arXiv 2412.18911).
    """

    name: ClassVar[str] = "duca"
    aggressive: ClassVar[bool] = True
    bonus: float = 0.8


class _TokenSession(Session):
    def __init__(self, sites: Sites, model: nn.Module, method: ToCa) -> None:
        super().__init__(sites)
        self._method = method
        self._interval = method.interval
        self._kind, self._step, self._total = StepKind.FULL, Step(index=0, timestep=0.0), 1
        self._kept: list[Output | None] = [None] * len(sites.sublayers)
        self._last: tuple[Tensor | None, ...] = ()  # what the last block returned
        self._scores: dict[int, Tensor] = {}  # s1, by token-wise MLP
        self._ages: dict[int, Tensor] = {}  # steps since a token was computed
        self._tokenwise = [n for n, s in enumerate(sites.sublayers) if s.per_token]
        probed = {} if method.score == "random" else _probe_paths(model, sites)
        paths = list(dict.fromkeys(probed.values()))
        self._mlps = [[n for n, p in probed.items() if p == path] for path in paths]
        self._attention = [_attention_of(sites, path) for path in paths]
        self._head_dims = [
            _head_dim(model.get_submodule(path.rpartition(".")[0])) for path in paths
        ]
        self._values: dict[int, Tensor] = {}  # probe -> values, while its attention runs

    def begin(self, step: Step) -> None:
        method = self._method
        self._step, self._total = step, 1000 if step.total is None else step.total
        first = step.index == 0
        self._kind = kind_of_step(
            step.left, self._interval, first=first, aggressive=method.aggressive
        )
        if self._kind is StepKind.FULL:
            self._interval = next_interval(
                method.interval, step.left, self._total, forced=method.ratio > 0
            )

    # -- sublayers ---------------------------------------------------------------------------------

    def sublayer(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        if self._kind is StepKind.FULL:
            return self._full(index, original, args, kwargs)
        kept = cast(Output, self._kept[index])
        if not self.sites.sublayers[index].per_token:
            return kept
        return self._some_tokens(index, cast(Tensor, kept), original, args, kwargs)

    def _full(
        self, index: int, original: Callable[..., Output], args: tuple[Any, ...], kwargs: Any
    ) -> Output:
        self.computed[index] = 1.0
        if self._method.score == "attention" and index in self._attention:
            with AttentionTap(lambda q, k, v, m, s: self._received(index, q, k, v, m, s)):
                output = original(*args, **kwargs)
        else:
            output = original(*args, **kwargs)
        if self._method.interval > 1:
            self._kept[index] = output
            self._ages.pop(index, None)
        return output

    def _some_tokens(
        self,
        index: int,
        kept: Tensor,
        original: Callable[..., Output],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden.shape[1]
        step = self._step
        layer = self.sites.sublayers[index].block
        share = token_ratio(
            self._method.ratio, step.left, self._total, layer, len(self.sites.blocks)
        )
        count = int(share * tokens)
        ages = self._ages.get(index)
        if ages is None:
            ages = torch.zeros(hidden.shape[:2], device=hidden.device)
        if count == 0:
            self._ages[index] = ages + 1
            return kept
        scores = self._base_scores(index, hidden) + 0.25 * ages / self._method.interval
        chosen = emphasise(scores, self._method.bonus).topk(count, dim=1).indices
        inputs = hidden.gather(1, _over_channels(chosen, hidden))
        if args:
            fresh = original(inputs, *args[1:], **kwargs)
        else:
            fresh = original(**{**kwargs, "hidden_states": inputs})
        output = kept.scatter(1, _over_channels(chosen, kept), cast(Tensor, fresh))
        self._kept[index] = output
        self._ages[index] = (ages + 1).scatter(1, chosen, 0.0)
        self.computed[index] = count / tokens
        return output

    def _base_scores(self, index: int, hidden: Tensor) -> Tensor:
        if self._method.score != "random":
            found = self._scores.get(index)
            if found is None:
                raise DiffusionError(
                    f"the values of the tokens of {self.sites.sublayers[index].path} were never "
                    "seen (are projections fused?); use score='random', or unfuse them"
                )
            return found
        # On the CPU and from numbers that all branches share: they choose alike, on any device.
        seed = (self._method.seed * 1_000_003 + self._step.index) * 1_009 + index
        drawn = torch.rand(1, hidden.shape[1], generator=torch.Generator().manual_seed(seed))
        return drawn.to(hidden.device).expand(hidden.shape[:2])

    # -- scores ------------------------------------------------------------------------------------

    def probe(self, number: int, output: Output) -> None:
        if self._kind is not StepKind.FULL or self._method.interval == 1:
            return
        values = cast(Tensor, output)
        if self._method.score == "attention":
            self._values[number] = values
            return
        heads = max(1, values.shape[-1] // self._head_dims[number])
        for mlp in self._mlps[number]:
            self._scores[mlp] = value_norm_score(values, heads)

    def _received(
        self, attention: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any
    ) -> None:
        ours = [n for n, a in enumerate(self._attention) if a == attention and n in self._values]
        if not ours:
            return
        heads = q.shape[1] // k.shape[1]
        if heads > 1:
            k = k.repeat_interleave(heads, dim=1)
        received = attention_received(q, k, mask=mask, scale=scale)
        for number in ours:
            values = self._values.pop(number)
            start = _place(values, v)
            for mlp in self._mlps[number]:
                self._scores[mlp] = received[:, start : start + values.shape[1]]

    # -- blocks ------------------------------------------------------------------------------------

    def block(self, index: int, call: BlockCall) -> Output:
        last = index == len(self.sites.blocks) - 1
        if self._kind is StepKind.AGGRESSIVE:
            self.ran[index] = 0.0
            return call.hand_on(self._last if last else None)
        output = call.compute()
        if last:
            self._last = call.parts(output)
        return output

    def held(self) -> Iterator[Any]:
        yield from (self._kept, self._last, self._scores, self._ages)


def _over_channels(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens[..., None].expand(-1, -1, like.shape[-1])


def _attention_of(sites: Sites, probe: str) -> int:
    path = probe.rpartition(".")[0]
    return next(n for n, s in enumerate(sites.sublayers) if s.path == path)


def _head_dim(attention: Any) -> int:
    heads = getattr(attention, "heads", 1)
    width: int = attention.to_q.out_features
    return max(1, width // heads)


def _place(part: Tensor, values: Tensor) -> int:
    """Where in the attention's values (batch, heads, tokens, dim) the tokens of `part` begin.

    Image and text are joined in one order or the other, by model; values are never rotated, so
    they are found by comparing.

    Raises:
        DiffusionError: they are at neither end.
    """
    repeats = values.shape[1] * values.shape[3] // part.shape[-1]
    flat = values[:, ::repeats].transpose(1, 2).flatten(2)
    tokens = part.shape[1]
    for start in dict.fromkeys((0, flat.shape[1] - tokens)):
        if torch.equal(flat[:, start : start + tokens], part):
            return start
    raise DiffusionError(
        "which of the attention's tokens belong to an MLP cannot be told in this model; use "
        "score='value_norm' or 'random'"
    )


def _probe_paths(model: nn.Module, sites: Sites) -> dict[int, str]:
    """For each token-wise MLP, the projection that makes its tokens' values.

    Raises:
        DiffusionError: an MLP's block has no such projection.
    """
    found: dict[int, str] = {}
    for number, sublayer in enumerate(sites.sublayers):
        if not sublayer.per_token:
            continue
        short = sublayer.path.rsplit(".", 1)[-1]
        name = "add_v_proj" if short in _CONTEXT else "to_v"
        for other in sites.blocks[sublayer.block].sublayers:
            path = f"{other.path}.{name}"
            if other.kind == "attention" and _has(model, path):
                found[number] = path
                break
        else:
            raise DiffusionError(
                f"{sublayer.path} has no self-attention with {name} in its block, so its tokens "
                "have no values to score; use score='random'"
            )
    return found


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False
