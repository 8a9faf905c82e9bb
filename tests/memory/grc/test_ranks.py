"""Two processes with gloo: one memory, whatever the share of each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from mnemon.memory.grc import GRCAttention

ROWS = (3, 1)  # unequal shares


def build(variant: str) -> GRCAttention:
    torch.manual_seed(0)
    module = GRCAttention(8, 2, memory_length=4, variant=variant).double()  # type: ignore[arg-type]
    module.memory.cache.cache.normal_()
    return module


def batch() -> torch.Tensor:
    return torch.randn(2, sum(ROWS), 6, 8, generator=torch.Generator().manual_seed(1)).double()


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2
    )
    found = {}
    for variant in ("paper", "repo"):
        module = build(variant)
        wrapped = DistributedDataParallel(module)
        outputs = []
        for x in batch():
            own = x[: ROWS[0]] if number == 0 else x[ROWS[0] :]
            out = wrapped(own)
            # DDP averages gradients over ranks; weighted so, they are those of all rows.
            (out.sum() * 2 / sum(ROWS)).backward()
            outputs.append(out.detach())
        found[variant] = {
            "outputs": outputs,
            "buffer": module.memory.cache.cache.clone(),
            "out": module.out.weight.grad,
        }
    alone = build("paper")
    real = torch.full((ROWS[number], 6), number == 0)  # the other has padding only
    alone(batch()[0][: ROWS[number]], real=real)
    found["padding"] = {"buffer": alone.memory.cache.cache.clone()}
    apart = build("paper")
    apart.memory.cache.synchronise = False
    apart(batch()[0][number : number + 1])
    found["apart"] = {"buffer": apart.memory.cache.cache.clone()}
    torch.save(found, Path(folder) / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_two_ranks_are_one(variant: str, ranks: list[dict[str, dict[str, object]]]) -> None:
    whole = build(variant).train()
    outputs = []
    for x in batch():
        out = whole(x)
        (out.sum() / sum(ROWS)).backward()
        outputs.append(out.detach())
    for number, part in enumerate((slice(None, ROWS[0]), slice(ROWS[0], None))):
        own = ranks[number][variant]
        torch.testing.assert_close(own["buffer"], whole.memory.cache.cache)
        for found, wanted in zip(own["outputs"], outputs, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(found, wanted[part])
        torch.testing.assert_close(own["out"], whole.out.weight.grad)


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
def test_a_rank_of_padding_and_ranks_apart(ranks: list[dict[str, dict[str, object]]]) -> None:
    first, second = (rank["padding"]["buffer"] for rank in ranks)
    wanted = build("paper").train()
    wanted(batch()[0][: ROWS[0]])
    torch.testing.assert_close(first, wanted.memory.cache.cache)
    torch.testing.assert_close(second, first)
    one, two = (rank["apart"]["buffer"] for rank in ranks)
    assert not torch.equal(one, two)  # type: ignore[arg-type]
