"""Training: a resumed run ends where an uninterrupted one does, bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemon.errors import ZooError
from mnemon.zoo.schedule import STAGES, Budget, Curriculum
from mnemon.zoo.trainer import Trainer, TrainOptions

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def options(out: Path, tokenizer: Any, max_steps: int) -> TrainOptions:
    """Options of a few tiny steps on made-up text."""
    out.mkdir(exist_ok=True)
    tokenizer.save_pretrained(out / "tokenizer")
    np.save(out / "text.npy", np.random.default_rng(0).integers(300, 4096, 9000).astype(np.uint16))
    (out / "corpus.json").write_text(json.dumps({}))
    return TrainOptions(
        out=out,
        budget=Budget(num_tokens=40_000),
        device="cpu",
        max_steps=max_steps,
        wired=False,
    )


def test_resuming_is_exact(tmp_path: Path, tokenizer: Any) -> None:
    whole = Trainer(options(tmp_path / "whole", tokenizer, 4), **SHAPE)
    whole.run()
    first = Trainer(options(tmp_path / "parts", tokenizer, 2), **SHAPE)
    first.run()
    second = Trainer(options(tmp_path / "parts", tokenizer, 4), **SHAPE)
    second.load()
    assert second.step == 2
    second.run()
    assert second.num_tokens == whole.num_tokens
    assert second.curriculum == whole.curriculum
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_exported_run_loads(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = Trainer(options(tmp_path, tokenizer, 1), **SHAPE)
    trainer.run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a b")["input_ids"]
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert (record["steps"], record["tokens"]) == (1, STAGES[0].step_tokens)
    assert str(tmp_path) not in json.dumps(record)


def test_resuming_nothing_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ZooError, match="no checkpoint"):
        Trainer(options(tmp_path, tokenizer, 1), **SHAPE).load()


def test_a_budget_needs_a_limit() -> None:
    with pytest.raises(ZooError, match="got neither"):
        Budget()


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    budget = Budget(num_tokens=100, decay_share=0.25)
    rates = [budget.rate(progress, step=1000) for progress in (0.0, 0.5, 0.75, 0.875, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])
    assert budget.rate(0.0, step=0) < 0.1


def test_the_curriculum_moves_on_when_learnt_or_when_time_is_up() -> None:
    curriculum = Curriculum()
    for _ in range(39):
        assert not curriculum.record(accuracy=1.0, progress=0.0, num_tokens=1)
    assert curriculum.record(accuracy=1.0, progress=0.0, num_tokens=7)
    assert (curriculum.stage, curriculum.history) == (1, [[1, 7]])
    assert curriculum.record(accuracy=0.0, progress=0.99, num_tokens=9)
    assert Curriculum(**curriculum.state()) == curriculum
