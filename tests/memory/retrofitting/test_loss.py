"""What a retrofit minimises."""

from __future__ import annotations

import pytest
import torch

from mnemon.memory.retrofitting.loss import distillation, mean_decision, next_token, shortfall


def test_distillation_is_the_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    q, p = student.softmax(-1), teacher.softmax(-1)
    by_token = (p * (p / q).log()).sum(-1)
    assert float(distillation(student, teacher)) == pytest.approx(float(by_token.mean()), rel=1e-5)
    weight = torch.tensor([[0, 1, 2, 0, 0], [0, 0, 0, 1, 0]])
    expected = (by_token[0, 1] + 2 * by_token[0, 2] + by_token[1, 3]) / 4
    assert float(distillation(student, teacher, weight)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation(teacher, teacher)) == 0


def test_next_token_is_the_cross_entropy_of_what_follows() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    by_token = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(next_token(logits, ids), by_token.mean())
    weight = torch.tensor([[1.0, 0, 0, 0, 9], [0, 0, 3, 0, 9]])  # the last predicts nothing known
    assert torch.allclose(
        next_token(logits, ids, weight), (by_token[0, 0] + 3 * by_token[1, 2]) / 4
    )


def test_no_weight_at_all_is_no_loss() -> None:
    logits = torch.randn(1, 4, 5)
    assert float(distillation(logits, logits + 1, torch.zeros(1, 4))) == 0


def test_shortfall_is_one_sided() -> None:
    lacking = torch.tensor(0.3, requires_grad=True)
    shortfall(lacking, 0.75).backward()
    assert lacking.grad == -1
    assert float(shortfall(lacking, 0.75).detach()) == pytest.approx(0.45)
    enough = torch.tensor(0.8, requires_grad=True)
    found = shortfall(enough, 0.75)
    found.backward()
    assert float(found.detach()) == 0
    assert enough.grad == 0


def test_mean_is_over_layers_heads_and_positions() -> None:
    records = [torch.tensor([[[1.0, 1, 0, 0], [0, 0, 0, 0]]]), torch.ones(1, 2, 4)]
    assert float(mean_decision(records)) == pytest.approx((0.25 + 1) / 2)
