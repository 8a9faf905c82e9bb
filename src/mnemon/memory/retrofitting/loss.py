"""What a retrofit minimises: distance to the model as it came, and compression that lacks."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation", "mean_decision", "next_token", "shortfall"]


def distillation(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(teacher || student) in nats, at temperature 1.

    Args:
        student: logits, [batch, tokens, vocab].
        teacher: logits of the model as it came, [batch, tokens, vocab].
        weight: of each token, [batch, tokens]; None weighs all the same.
    """
    wanted = ... if weight is None else weight > 0
    found = F.kl_div(
        student[wanted].float().log_softmax(-1),
        teacher[wanted].float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return _mean(found, weight)


def next_token(student: Tensor, ids: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the tokens that follow, in nats.

    Args:
        student: logits, [batch, tokens, vocab]; the last predicts nothing that is known.
        ids: [batch, tokens].
        weight: of each prediction, [batch, tokens], by the token that predicts; None weighs all
            the same.
    """
    weight = None if weight is None else weight[:, :-1]
    wanted = ... if weight is None else weight > 0
    logits, target = student[:, :-1][wanted].float(), ids[:, 1:][wanted]
    found = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return _mean(found.view(target.shape), weight)


def mean_decision(records: Iterable[Tensor]) -> Tensor:
    """What is compressed away: the mean over layers, heads and positions.

    Args:
        records: decisions of each layer, [batch, kv_heads, tokens].
    """
    return torch.stack([decisions.mean() for decisions in records]).mean()


def shortfall(mean: Tensor, target: float) -> Tensor:
    """One-sided: how much compression lacks of its target; 0 and no gradient beyond it.

    Source:
        DMC (2403.09636), equation 8.
    """
    return (target - mean).clamp(min=0.0)


def _mean(found: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return found.mean()
    chosen = weight[weight > 0].to(found.dtype)
    return (found * chosen).sum() / chosen.sum().clamp(min=torch.finfo(found.dtype).tiny)
