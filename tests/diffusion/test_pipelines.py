"""The tiny pipelines are what the tests of caching take them for."""

from typing import Any

import pytest
import torch
from tests.diffusion.pipelines import PIPELINES, Tiny, by_name, compare
from torch import Tensor, nn

STEPS, BATCH = 4, 2
every = pytest.mark.parametrize("tiny", PIPELINES, ids=lambda tiny: tiny.name)


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return tuple(None if part is None else torch.zeros_like(part) for part in output)


def _attentions(transformer: nn.Module) -> list[nn.Module]:
    """The first attention of every block, refiners left out."""
    return [
        module
        for name, module in transformer.named_modules()
        if name.endswith((".attn", ".attn1")) and "refiner" not in name
    ]


@every
def test_runs_and_repeats(tiny: Tiny) -> None:
    pipeline = tiny.build()
    first = tiny.call(pipeline, STEPS, BATCH, 0)
    assert first.shape[0] == BATCH
    assert first.isfinite().all()
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, tiny.call(pipeline, STEPS, BATCH, 0))
    assert torch.equal(first, tiny.call(tiny.build(), STEPS, BATCH, 0))
    assert compare(first, tiny.call(pipeline, STEPS, BATCH, 1)) > 0.01


@every
def test_guidance_runs_as_it_says(tiny: Tiny) -> None:
    pipeline = tiny.build()
    batches: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

    pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    tiny.call(pipeline, STEPS, BATCH, 0)
    expected = {
        "batched": [2 * BATCH] * STEPS,
        "separate": [BATCH] * (2 * STEPS),
        "none": [BATCH] * STEPS,
    }
    assert batches == expected[tiny.guidance]


@every
def test_every_block_matters(tiny: Tiny) -> None:
    pipeline = tiny.build()
    whole = tiny.call(pipeline, STEPS, BATCH, 0)
    attentions = _attentions(pipeline.transformer)
    assert len(attentions) >= 3
    for attention in attentions:
        handle = attention.register_forward_hook(_zero)
        without = tiny.call(pipeline, STEPS, BATCH, 0)
        handle.remove()
        assert without.isfinite().all()
        assert compare(whole, without) > 1e-3


@every
def test_steps_differ(tiny: Tiny) -> None:
    """What an attention returns in the first step would be wrong in the next one."""
    pipeline = tiny.build()
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    _attentions(pipeline.transformer)[-1].register_forward_hook(keep)
    tiny.call(pipeline, STEPS, BATCH, 0)
    one_step = len(outputs) // STEPS
    assert compare(outputs[0], outputs[one_step]) > 0.01


@pytest.mark.parametrize("name", ["qwen-image", "lumina2"])
def test_branches_of_unequal_length(name: str) -> None:
    tiny = by_name(name)
    pipeline = tiny.build()
    lengths: list[tuple[int, ...]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        lengths.append(tuple(output.shape if isinstance(output, Tensor) else output[1].shape))

    _attentions(pipeline.transformer)[0].register_forward_hook(keep)
    tiny.call(pipeline, STEPS, BATCH, 0)
    assert lengths[0] != lengths[1]
    assert lengths[::2] == [lengths[0]] * STEPS
    assert lengths[1::2] == [lengths[1]] * STEPS
