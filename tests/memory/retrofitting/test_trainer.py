"""A retrofit: what learns, what it comes to, interruption and resumption."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FAMILIES, random_rows, small_model

import mnemon.memory
from mnemon.compression import compression_of
from mnemon.errors import LearnedMemoryError
from mnemon.hf.compressing import compressible_layers
from mnemon.hf.neurons import borrowed_rows
from mnemon.memory.retrofitting import (
    Progress,
    RetrofitOptions,
    Retrofitter,
    calibrate,
    measure,
    retrofit,
)
from mnemon.memory.retrofitting.attaching import control_of
from mnemon.memory.retrofitting.measuring import stored_tokens
from mnemon.memory.retrofitting.retrofit import run_with_checkpoints

FAST: dict[str, Any] = {"rate": 1e-3, "decision_rate": 3e-3, "length": 24, "batch": 2}


def options(method: str, **more: Any) -> RetrofitOptions:
    if method == "dms":
        more = {"window": 4} | more
    if method == "dmc":
        more = {"factor": 10.0} | more
    return RetrofitOptions(**({"method": method, "steps": 12, "ratio": 2} | FAST | more))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dms_reaches_its_projection(family: str) -> None:
    trainer = Retrofitter(small_model(family), random_rows, options("dms"))
    before = weights(trainer.model)
    trainer.train_step()
    after = weights(trainer.model)
    decisions = [name for name in after if "mnemon_decision" in name]
    assert len(decisions) == 2
    for name in decisions:
        assert not torch.equal(before[name], after[name])
    assert all(torch.isfinite(weight).all() for weight in after.values())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dmc_reaches_the_borrowed_rows(family: str) -> None:
    """Reset when the neuron has faded, then moved by the decisions alone."""
    trainer = Retrofitter(small_model(family), random_rows, options("dmc", neuron_share=0.25))
    assert trainer.stages.neuron == 3
    plain = [row.clone() for row in borrowed(trainer)]
    for _ in range(3):
        trainer.train_step()
    assert all(trainer.control.records == {} for _ in "a")  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(plain, borrowed(trainer), strict=True))
    trainer.train_step()
    rate = FAST["rate"]
    moved = [float(row.abs().max()) for row in borrowed(trainer)]
    assert max(moved) > 0
    assert max(moved) <= 3 * rate  # from zero, by one step of Adam


def borrowed(trainer: Retrofitter) -> list[torch.Tensor]:
    return [
        rows for layer in compressible_layers(trainer.model) for rows in borrowed_rows(layer, "dmc")
    ]


def test_borrowed_rows_make_the_neuron() -> None:
    model = small_model("qwen2")
    layer: Any = compressible_layers(model)[0]
    hidden = torch.randn(1, 3, 32)
    for rows in borrowed_rows(layer, "dmc"):
        rows.zero_()
    keys, query = layer.k_proj(hidden).view(1, 3, 2, 8), layer.q_proj(hidden).view(1, 3, 4, 8)
    assert (keys[..., -1] == 0).all()
    assert (query[..., -1] == 0).all()
    assert (keys[..., :-1] != 0).all()
    model = small_model("qwen2")
    layer = compressible_layers(model)[0]
    for rows in borrowed_rows(layer, "dms"):
        rows.zero_()
    query = layer.q_proj(hidden).view(1, 3, 4, 8)
    assert (query[..., [0, 2], -1] == 0).all()
    assert (query[..., [1, 3], :] != 0).all()
    assert (layer.k_proj(hidden) != 0).all()


def test_first_stage_keeps_every_token_and_fades_the_neuron() -> None:
    trainer = Retrofitter(small_model(), random_rows, options("dmc", neuron_share=0.5))
    left = []
    for _ in range(6):
        progress = trainer.train_step()
        left.append(trainer.control.neuron_left)  # type: ignore[union-attr]
        assert progress.measured == 1
    assert left == pytest.approx([1 - i / 6 for i in range(6)])


@pytest.mark.parametrize("method", ["dms", "dmc"])
def test_it_learns_to_compress(method: str) -> None:
    seen: list[Progress] = []
    steps = options(method, steps=60, ratio=3, pressure=5.0, neuron_share=0.1, factor=100.0)
    model = Retrofitter(small_model(), random_rows, steps).run(seen.append)
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[0].measured < 1.1
    assert seen[-1].measured > 1.7
    assert seen[-1].ratio == pytest.approx(3, abs=0.1)
    assert len(seen[-1].by_head) == 2
    assert len(seen[-1].by_head[0]) == 2
    found = calibrate(model, [random_rows(1000).ids, random_rows(1001).ids], 3.0, tolerance=0.1)
    assert found.ratio >= 2.7
    assert measure(model, [random_rows(1000).ids, random_rows(1001).ids]) == found
    said = compression_of(model.config)
    assert said is not None
    assert said == control_of(model).compression  # type: ignore[union-attr]
    assert said.ratio == 3


def test_only_the_student_changes() -> None:
    plain = weights(small_model())
    trainer = Retrofitter(small_model(), random_rows, options("dms"))
    trainer.run()
    assert trainer.teacher is not None
    assert same(weights(trainer.teacher), plain)
    assert not any(weight.requires_grad for weight in trainer.teacher.parameters())
    assert not same({k: v for k, v in weights(trainer.model).items() if k in plain}, plain)


@pytest.mark.parametrize("loss", ["distill", "text", "both"])
def test_losses(loss: str) -> None:
    trainer = Retrofitter(small_model(), random_rows, options("dms", loss=loss))
    assert (trainer.teacher is None) == (loss == "text")
    first = trainer.train_step().loss
    ids = random_rows(0).ids
    plain = small_model()
    with torch.no_grad():
        entropy = float(
            torch.nn.functional.cross_entropy(
                plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
        )
    assert first == pytest.approx(0 if loss == "distill" else entropy, abs=2e-2)


def test_control_does_not_compress() -> None:
    model = retrofit(small_model(), None, data=random_rows, steps=5, **FAST, loss="text")
    assert control_of(model) is None
    assert compression_of(model.config) is None
    assert type(compressible_layers(model)[0].forward).__name__ == "method"
    assert not same(weights(model), weights(small_model()))


@pytest.mark.parametrize("method", ["dms", "dmc", "none"])
def test_going_on_is_bit_identical(tmp_path: Path, method: str) -> None:
    whole = Retrofitter(small_model(), random_rows, options(method, loss="both"))
    seen: list[Progress] = []
    whole.run(seen.append)
    first = Retrofitter(small_model(), random_rows, options(method, loss="both"))
    for _ in range(7):
        first.train_step()
    first.save(tmp_path / "run.pt")
    second = Retrofitter(small_model(), random_rows, options(method, loss="both"))
    second.load(tmp_path / "run.pt")
    rest: list[Progress] = []
    second.run(rest.append)
    assert rest == seen[7:]
    assert second.num_tokens == whole.num_tokens
    assert same(weights(second.model), weights(whole.model))


def test_ctrl_c_leaves_a_checkpoint_between_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = Retrofitter(small_model(), random_rows, options("dms"))
    whole.run()

    def interrupted(step: int) -> Any:
        if step == 5:  # in the middle of a step
            os.kill(os.getpid(), signal.SIGINT)
        return random_rows(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        retrofit(
            small_model(), "dms", 2, data=interrupted, window=4, steps=12, **FAST, checkpoint=path
        )
    assert signal.getsignal(signal.SIGINT) is before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    seen: list[Progress] = []
    model = retrofit(
        small_model(), "dms", 2, data=random_rows, window=4, steps=12, **FAST, checkpoint=path,
        resume=True, after_step=seen.append, calibrated=False,
    )  # fmt: skip
    assert seen[0].step == 7
    assert same(weights(model), weights(whole.model))
    assert not path.exists()


def _endless(path: str) -> None:
    torch.set_num_threads(1)
    trainer = Retrofitter(small_model(), random_rows, options("dms", steps=100_000))
    run_with_checkpoints(trainer, path, every_s=0.0)


def test_a_killed_run_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    process = multiprocessing.get_context("spawn").Process(target=_endless, args=(str(path),))
    process.start()
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    trainer = Retrofitter(small_model(), random_rows, options("dms", steps=100_000))
    trainer.load(path)
    assert trainer.step > 0
    trainer.train_step()


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    trainer = Retrofitter(small_model(), random_rows, options("dms"))
    trainer.save(path)
    with pytest.raises(LearnedMemoryError, match="not there"):
        trainer.load(tmp_path / "other.pt")
    for other, said in (
        (Retrofitter(small_model(), random_rows, options("dms", ratio=3)), "ratio is 2"),
        (Retrofitter(small_model(seed=1), random_rows, options("dms")), "model is"),
        (Retrofitter(small_model(), random_rows, options("dmc")), "factor|method"),
    ):
        with pytest.raises(LearnedMemoryError, match=said):
            other.load(path)
    for damage in (b"", b"not a checkpoint", path.read_bytes()[:5000]):
        path.write_bytes(damage)
        with pytest.raises(LearnedMemoryError, match="no checkpoint of a retrofit"):
            trainer.load(path)
    with pytest.raises(LearnedMemoryError, match="resume needs"):
        retrofit(small_model(), "dms", data=random_rows, resume=True)


def test_in_a_thread_of_its_own() -> None:
    done: list[Any] = []

    def work() -> None:
        done.append(retrofit(small_model(), "dms", 2, data=random_rows, steps=2, **FAST))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(done) == 1


def test_models_that_cannot_be_retrofitted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    with pytest.raises(LearnedMemoryError, match="GPT2"):
        retrofit(other, "dms", data=random_rows)
    model = retrofit(small_model(), "dms", 2, data=random_rows, steps=2, **FAST)
    with pytest.raises(LearnedMemoryError, match="compresses already"):
        retrofit(model, "dms", data=random_rows)
    with pytest.raises(LearnedMemoryError, match="tokenizer"):
        retrofit(small_model(), "dms")
    with pytest.raises(LearnedMemoryError, match="learning_rate"):
        retrofit(small_model(), "dms", data=random_rows, learning_rate=1.0)


def test_stored_tokens() -> None:
    marks = torch.tensor([[[0.0, 1, 1, 0, 1, 1]]])
    dms = options("dms", window=2).compression()
    dmc = options("dmc").compression()
    assert dms is not None
    assert dmc is not None
    # Marked are tokens 0, 1, 3 and 4; the next query sees the last two whatever they are.
    assert stored_tokens(dms, marks).tolist() == [[6 - 3]]
    assert stored_tokens(dmc, marks).tolist() == [[2]]


def test_public_names() -> None:
    assert mnemon.memory.retrofit is retrofit


def test_bfloat16_autocast() -> None:
    model = deepcopy(small_model())
    seen: list[Progress] = []
    retrofit(
        model, "dms", 2, data=random_rows, steps=3, **FAST, autocast=True, after_step=seen.append
    )
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert all(progress.loss < 0.1 for progress in seen)
