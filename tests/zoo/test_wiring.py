"""The structured start: it recalls before any training, and refuses other shapes."""

from typing import Any

import numpy as np
import pytest
import torch

from mnemon.errors import ZooError
from mnemon.zoo import tasks
from mnemon.zoo.architecture import build_model, model_config
from mnemon.zoo.prepare import task_vocabulary
from mnemon.zoo.wiring import wire_induction


def test_the_wired_model_recalls_before_training(tokenizer: Any) -> None:
    model = build_model(model_config(vocab_size=4096), seed=0)
    wire_induction(model, seed=0)
    rows, _ = tasks.make_rows(
        seed=0,
        step=0,
        num_rows=4,
        length=512,
        vocabulary=task_vocabulary(tokenizer),
        text=np.random.default_rng(0).integers(300, 4096, 9000),
        shares=(0.0, 1.0, 0.0),
    )
    with torch.inference_mode():
        guess = model(torch.from_numpy(rows.ids)).logits[:, :-1].argmax(-1).numpy()
    recalled = rows.distance[:, 1:] > 0
    assert (guess == rows.ids[:, 1:])[recalled].mean() > 0.9


def test_another_shape_is_refused() -> None:
    model = build_model(model_config(vocab_size=64, hidden_size=128, num_hidden_layers=2), seed=0)
    with pytest.raises(ZooError, match="drawn for hidden size"):
        wire_induction(model, seed=0)
