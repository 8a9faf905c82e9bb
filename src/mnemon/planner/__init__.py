"""Bytes of a model's cache from its config.json alone: no torch, no transformers, no weights.

Exact to the byte against `mnemon.Cache.nbytes` (and `nbytes_reserved` for `static(n)`) after a
real forward pass. What it does not know is a `PlanError`, never a guess.
"""

from mnemon.planner.families import MODEL_TYPES, NO_STATIC
from mnemon.planner.layers import LayerPlan, ModelPlan, plan_model
from mnemon.planner.recipes import DTYPES, CachePlan, max_batch, max_context, plan_cache
from mnemon.planner.weights import model_dtype, weight_bytes

__all__ = [
    "DTYPES",
    "MODEL_TYPES",
    "NO_STATIC",
    "CachePlan",
    "LayerPlan",
    "ModelPlan",
    "max_batch",
    "max_context",
    "model_dtype",
    "plan_cache",
    "plan_model",
    "weight_bytes",
]
