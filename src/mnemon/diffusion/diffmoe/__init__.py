"""Mixtures of experts in place of a diffusion transformer's feed-forwards (DiffMoE).

    from mnemon.diffusion.diffmoe import install, set_rule
    install(pipe.transformer, "diffmoe", num_experts=8)      # every second block
    set_rule(pipe.transformer, "threshold")                  # a sample alone decides what it costs

- `layer`: what the kinds share; `experts`: their feed-forwards
- `batch_pool`: DiffMoE, experts choose among the whole batch's tokens
- `token_choice`, `expert_choice`: the baselines
- `place`: puts them into a model and takes them out again, losses and capacity used
- `cost`: parameters and multiply-adds; `files`: pipelines on disk; `ranks`: several processes
"""

from mnemon.diffusion.diffmoe.batch_pool import DiffMoE, Rule
from mnemon.diffusion.diffmoe.cost import Cost, cost
from mnemon.diffusion.diffmoe.expert_choice import ExpertChoice
from mnemon.diffusion.diffmoe.experts import Experts
from mnemon.diffusion.diffmoe.files import load_moe, save_moe
from mnemon.diffusion.diffmoe.layer import MoELayer, Usage
from mnemon.diffusion.diffmoe.place import (
    KINDS,
    Call,
    auxiliary_loss,
    install,
    moe_layers,
    recorded_usage,
    set_rule,
    set_training,
    uninstall,
)
from mnemon.diffusion.diffmoe.token_choice import TokenChoice

__all__ = [
    "KINDS",
    "Call",
    "Cost",
    "DiffMoE",
    "ExpertChoice",
    "Experts",
    "MoELayer",
    "Rule",
    "TokenChoice",
    "Usage",
    "auxiliary_loss",
    "cost",
    "install",
    "load_moe",
    "moe_layers",
    "recorded_usage",
    "save_moe",
    "set_rule",
    "set_training",
    "uninstall",
]
