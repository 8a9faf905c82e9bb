"""Caching methods once more, block by block for a DiT, in plain loops: what tests compare with.

Nothing here is fast, and nothing comes from mnemon.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PlainDBCache", "PlainTokens", "dit_forward", "emphasised", "sample"]

Run = Callable[[Tensor, Any, Any, Any], Tensor]


def every_block(hidden: Tensor, blocks: Any, timestep: Tensor, labels: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden, timestep=timestep, class_labels=labels)
    return hidden


def dit_forward(
    model: Any, x: Tensor, timestep: Tensor, labels: Tensor, run: Run = every_block
) -> Tensor:
    """DiTTransformer2DModel.forward, with `run` in place of its loop over the blocks."""
    size, patch = x.shape[-1] // model.patch_size, model.patch_size
    hidden = run(model.pos_embed(x), model.transformer_blocks, timestep, labels)
    emb = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(functional.silu(emb)).chunk(2, dim=1)
    hidden = model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
    hidden = model.proj_out_2(hidden)
    hidden = hidden.reshape(-1, size, size, patch, patch, model.out_channels)
    hidden = torch.einsum("nhwpqc->nchpwq", hidden)
    return hidden.reshape(-1, model.out_channels, size * patch, size * patch)


def sample(model: Any, timesteps: list[int], run: Run, *, batch: int = 2, seed: int = 0) -> Tensor:
    """What NoisyLoop does."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=noise, dtype=torch.float64)
    labels = torch.arange(batch) * 7 + 3
    for timestep in timesteps:
        out = dit_forward(model, x, torch.full((batch,), timestep), labels, run)
        x = x - out / len(timesteps)
    return x


@dataclass
class PlainDBCache:
    """`front` blocks decide, `back` blocks mend, the middle's residual is reused."""

    threshold: float
    front: int = 1
    back: int = 0
    warmup: int = 0
    longest: int | None = None
    decisions: list[bool] = field(default_factory=list)  # whether the middle was left out
    changes: list[float] = field(default_factory=list)
    kept: Any = None

    def __call__(self, hidden: Tensor, blocks: Any, timestep: Tensor, labels: Tensor) -> Tensor:
        end = len(blocks) - self.back
        first = every_block(hidden, blocks[: self.front], timestep, labels)
        added = first - hidden
        skip = False
        if self.kept is not None:
            before, middle = self.kept
            change = ((added - before).abs().mean() / before.abs().mean()).item()
            self.changes.append(change)
            row = 0
            while row < len(self.decisions) and self.decisions[-1 - row]:
                row += 1
            skip = (
                change < self.threshold
                and len(self.decisions) >= self.warmup
                and (self.longest is None or row < self.longest)
            )
        self.decisions.append(skip)
        if skip:
            hidden = first + middle
        else:
            hidden = every_block(first, blocks[self.front : end], timestep, labels)
            self.kept = (added, hidden - first)
        return every_block(hidden, blocks[end:], timestep, labels)


def emphasised(scores: list[float], side: int, bonus: float) -> list[float]:
    """The first of the highest scores in each 2 x 2 patch of a square picture, raised."""
    found = list(scores)
    for top in range(0, side, 2):
        for left in range(0, side, 2):
            patch = [(top + i) * side + left + j for i in (0, 1) for j in (0, 1)]
            best = max(patch, key=lambda token: scores[token])
            found[best] *= 1 + bonus
    return found


@dataclass
class PlainTokens:
    """ToCa and DuCa, as PAPERS.md writes them down."""

    num_steps: int
    interval: int
    ratio: float
    bonus: float
    score: str
    aggressive: bool
    kinds: list[str] = field(default_factory=list)
    ages: dict[int, Tensor] = field(default_factory=dict)
    chosen: list[dict[int, Tensor]] = field(default_factory=list)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    mlps: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    last: Any = None
    now: int = 0  # the interval that holds

    def __call__(self, hidden: Tensor, blocks: Any, timestep: Tensor, labels: Tensor) -> Tensor:
        step = self.num_steps - 1 - len(self.kinds)
        self.kinds.append(self.kind(step))
        self.chosen.append({})
        if self.kinds[-1] == "aggressive":
            return self.last
        if self.kinds[-1] == "full":
            self.now = self.next_interval(step)
        for layer, block in enumerate(blocks):
            hidden = self.block(block, layer, len(blocks), step, hidden, timestep, labels)
        self.last = hidden
        return hidden

    def kind(self, step: int) -> str:
        if not self.kinds or step % self.now == 0:
            return "full"
        if self.aggressive and (step % self.now) % 2 == 0:
            return "aggressive"
        return "conservative"

    def next_interval(self, step: int) -> int:
        num = self.num_steps
        if self.ratio == 0 or self.interval == 1:
            return self.interval
        if 0.2 * num <= step < 0.4 * num:
            return 2
        return round(self.interval / (1 + 0.4 - 0.8 * step / num))

    def share(self, step: int, layer: int, layers: int) -> float:
        share = self.ratio * (1 + 2 - 4 * step / self.num_steps)
        return min(1, max(0, share * (0.8 + 0.4 * layer / (layers - 1)) * 2.5))

    def block(
        self,
        block: Any,
        layer: int,
        layers: int,
        step: int,
        hidden: Tensor,
        timestep: Tensor,
        labels: Tensor,
    ) -> Tensor:
        normed, gate, shift, scale, gate_mlp = block.norm1(
            hidden, timestep, labels, hidden_dtype=hidden.dtype
        )
        full = self.kinds[-1] == "full"
        if full:
            self.attentions[layer] = block.attn1(normed)
            self.scores[layer] = self.base_score(block.attn1, normed)
            self.ages[layer] = torch.zeros(hidden.shape[:2], dtype=torch.float64)
        hidden = hidden + gate[:, None] * self.attentions[layer]
        inner = block.norm3(hidden) * (1 + scale[:, None]) + shift[:, None]
        if full:
            self.mlps[layer] = block.ff(inner)
        else:
            self.refresh(block, layer, inner, int(self.share(step, layer, layers) * inner.shape[1]))
        return hidden + gate_mlp[:, None] * self.mlps[layer]

    def refresh(self, block: Any, layer: int, inner: Tensor, count: int) -> None:
        scores = self.scores[layer] + 0.25 * self.ages[layer] / self.interval
        chosen = torch.zeros(inner.shape[:2], dtype=torch.bool)
        mlp = self.mlps[layer].clone()
        for sample, row in enumerate(scores.tolist()):
            raised = emphasised(row, math.isqrt(len(row)), self.bonus)
            order = sorted(range(len(row)), key=lambda token: -raised[token])[:count]
            chosen[sample, order] = True
            for token in order:
                mlp[sample, token] = block.ff(inner[sample, token][None, None])[0, 0]
        self.mlps[layer] = mlp
        self.ages[layer] = torch.where(chosen, 0.0, self.ages[layer] + 1)
        self.chosen[-1][layer] = chosen

    def base_score(self, attention: Any, normed: Tensor) -> Tensor:
        heads = attention.heads
        if self.score == "value_norm":
            norms = torch.zeros(normed.shape[:2], dtype=torch.float64)
            for head in attention.to_v(normed).chunk(heads, dim=-1):
                norms += head.square().sum(-1).sqrt()
            return 1 - norms / norms.square().sum(-1, keepdim=True).sqrt()
        total = torch.zeros(normed.shape[:2], dtype=torch.float64)
        queries, keys = attention.to_q(normed), attention.to_k(normed)
        for q, k in zip(queries.chunk(heads, -1), keys.chunk(heads, -1), strict=True):
            weights = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            total += weights.softmax(-1).sum(1) / heads
        return total / total.square().sum(-1, keepdim=True).sqrt()
