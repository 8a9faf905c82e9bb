"""Which tokens stay: one file per policy, and the layer that carries a policy out.

base          what a policy is: settings and a rule, no state
layer         a storage layer under a policy: what attention saw, and when tokens go
building      from a recipe to the layers of a cache
window_sinks  the newest tokens, and the first
random        a random choice, the baseline of every other policy
h2o           those that got most attention, and the newest
tova          those that the last token attended to
"""

from mnemon.policies.base import Policy, Slots
from mnemon.policies.building import build_all, policy_of
from mnemon.policies.h2o import H2O
from mnemon.policies.layer import PolicyLayer
from mnemon.policies.random import Random
from mnemon.policies.tova import Tova
from mnemon.policies.window_sinks import WindowSinks

__all__ = [
    "H2O",
    "Policy",
    "PolicyLayer",
    "Random",
    "Slots",
    "Tova",
    "WindowSinks",
    "build_all",
    "policy_of",
]
