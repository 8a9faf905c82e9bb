"""What the tests of attachment, runs and methods share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from mnemon.diffusion import Method, Router, find_sites, make_method

__all__ = ["NoisyLoop", "Replay", "Toy", "attributes", "l2c", "router", "tiny_dit"]

Source = int | None | dict[str, int | None]


def attributes(pipeline: Any) -> dict[str, Any]:
    """All that modules, their classes, the scheduler and the pipeline carry, by name.

    Values of modules and classes count by identity, those of scheduler and pipeline change in runs.
    """
    found: dict[str, Any] = {"pipeline": sorted(vars(pipeline))}
    for part, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            for name, module in component.named_modules():
                found[f"{part}.{name}"] = {k: id(v) for k, v in vars(module).items()}
                kind = type(module)
                found[f"class {kind.__qualname__}"] = {k: id(v) for k, v in vars(kind).items()}
        elif component is not None:
            found[part] = sorted(vars(component))
            found[f"class of {part}"] = sorted(vars(type(component)))
    return found


def router(model: nn.Module, num_steps: int, *, score: float, threshold: float = 0.5) -> Router:
    """The same score for every sublayer at every cache step."""
    sites = find_sites(model)
    return Router(
        scores=torch.full((num_steps // 2, len(sites.sublayers)), score),
        threshold=threshold,
        num_steps=num_steps,
        model=sites.model,
        paths=tuple(s.path for s in sites.sublayers),
    )


def l2c(model: nn.Module, num_steps: int, *, score: float) -> Method:
    """Learning-to-Cache with such a router."""
    return make_method("l2c", router=router(model, num_steps, score=score))


def tiny_dit(*, layers: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A DiT of 16 tokens whose sublayers and gates matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=8,
            num_embeds_ada_norm=1000,
        )
    model = model.eval().requires_grad_(False).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(1.5)
    return model


class NoisyLoop:
    """A denoising loop without a scheduler: timesteps fall from 950 in equal strides."""

    def __init__(self, model: nn.Module, *, steps: int = 6, batch: int = 2, size: int = 8) -> None:
        self.model, self.steps, self.batch, self.size = model, steps, batch, size

    @property
    def timesteps(self) -> list[int]:
        return [951 - 1000 // self.steps * n for n in range(self.steps)]

    def __call__(
        self, seed: int = 0, *, each: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """The latents after all steps; `each` is called with the step and its output."""
        dtype = next(self.model.parameters()).dtype
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, 4, self.size, self.size, generator=noise, dtype=dtype)
        labels = torch.arange(self.batch) * 7 + 3
        for number, timestep in enumerate(self.timesteps):
            times = torch.full((self.batch,), timestep)
            out = self.model(x, timestep=times, class_labels=labels, return_dict=False)[0]
            if each is not None:
                each(number, out)
            x = x - out / self.steps
        return x


class _Scale(nn.Module):
    """A sublayer: its input times `weight`; `seen` keeps what it returned."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = hidden_states * self.weight
        self.seen.append(output)
        return output


class _ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = _Scale(0.3)
        self.ff = _Scale(-0.2)
        self.received: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        attention = self.attn(hidden_states)
        hidden_states = hidden_states + attention
        mlp = self.ff(hidden_states)
        self.received.append((attention, mlp))
        return hidden_states + mlp


class Toy(nn.Module):
    """A transformer that no table knows, with the usual names; blocks keep what they received."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ToyBlock() for _ in range(blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Replay:
    """The reference for schedules: calls of `model` whose sublayers answer as in an earlier call.

    Plain hooks on the model's own forward; nothing of mnemon is in the way but the names.

    Args:
        model: not attached.
        sources: by call of the model, the number of the call whose un-gated sublayer outputs it
            uses, or None where it computes its own; in a dictionary, by sublayer.
    """

    def __init__(self, model: nn.Module, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.calls = 0
        self.outputs: list[dict[str, Any]] = []
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for sublayer in find_sites(model).sublayers:
            hook = functools.partial(self._answer, sublayer.path)
            self._handles.append(model.get_submodule(sublayer.path).register_forward_hook(hook))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.calls += 1
        self.outputs.append({})

    def _answer(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        source = self.sources[self.calls - 1]
        if isinstance(source, dict):
            source = source.get(path)
        kept = output if source is None else self.outputs[source][path]
        self.outputs[-1][path] = kept
        return kept

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if error[0] is None:
            assert self.calls == len(self.sources)
