"""Several feed-forwards of one shape, each for the tokens it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mnemon.errors import ModelError

__all__ = ["Experts"]


@final
class Experts(nn.Module):
    """`num_experts` times W2 GELU(W1 x), the weights of all in one tensor each.

    An expert is two products over its own rows: on a CPU as fast as a batched product over equal
    numbers of rows, and right for unequal ones.

    Args:
        num_experts: how many.
        dim: of a token.
        hidden_dim: of a token inside an expert.
        approximate: of GELU, "none" or "tanh".
        bias: whether the two products add one.
        dropout: share of hidden numbers dropped in training.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        approximate: str = "tanh",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.approximate, self.dropout = approximate, dropout
        self.weight_in = _uniform(num_experts, hidden_dim, dim, fan_in=dim)
        self.weight_out = _uniform(num_experts, dim, hidden_dim, fan_in=hidden_dim)
        self.bias_in = _uniform(num_experts, hidden_dim, fan_in=dim) if bias else None
        self.bias_out = _uniform(num_experts, dim, fan_in=hidden_dim) if bias else None

    @classmethod
    def like(cls, feed_forward: nn.Module, num_experts: int, *, copy: bool = False) -> Experts:
        """Experts of a diffusers `FeedForward`'s shape, fresh ones or copies of it.

        Raises:
            ModelError: it is another module, or one with another activation than GELU.
        """
        net: Any = getattr(feed_forward, "net", None)
        if net is None or len(net) != 3 or not hasattr(net[0], "approximate"):
            raise ModelError(
                f"a feed-forward {feed_forward} came; expected diffusers' FeedForward with GELU "
                "and without a final dropout"
            )
        first, second = net[0].proj, net[2]
        made = cls(
            num_experts,
            first.in_features,
            first.out_features,
            approximate=net[0].approximate,
            bias=first.bias is not None,
            dropout=net[1].p,
        )
        if copy:
            with torch.no_grad():
                made.weight_in.copy_(first.weight)
                made.weight_out.copy_(second.weight)
                if made.bias_in is not None and made.bias_out is not None:
                    made.bias_in.copy_(first.bias)
                    made.bias_out.copy_(second.bias)
        return made.to(first.weight.device, first.weight.dtype)

    def forward(
        self,
        tokens: Float[Tensor, "tokens dim"],
        rows: Sequence[Int[Tensor, " chosen"]],
        weights: Sequence[Float[Tensor, " chosen"]],
    ) -> Float[Tensor, "tokens dim"]:
        """The weighted sum of what each expert says of its rows; 0 for rows that none has."""
        said = []
        # A slice's gradient would be as large as the whole; unbind's are joined once.
        weights_in, weights_out = self.weight_in.unbind(), self.weight_out.unbind()
        none = (None,) * self.num_experts
        biases_in = none if self.bias_in is None else self.bias_in.unbind()
        biases_out = none if self.bias_out is None else self.bias_out.unbind()
        every = torch.cat(list(rows))
        given = tokens.index_select(0, every).split([len(chosen) for chosen in rows])
        for i, inputs in enumerate(given):
            hidden = F.linear(inputs, weights_in[i], biases_in[i])
            hidden = F.gelu(hidden, approximate=self.approximate)
            hidden = F.dropout(hidden, self.dropout, self.training)
            said.append(F.linear(hidden, weights_out[i], biases_out[i]))
        joined = torch.cat(said)
        weighted = joined * torch.cat(list(weights)).to(joined.dtype)[:, None]
        return joined.new_zeros(tokens.shape).index_add(0, every, weighted)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    # as nn.Linear begins
    limit = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-limit, limit))
