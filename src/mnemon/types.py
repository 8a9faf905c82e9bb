"""Shape aliases used in annotations (jaxtyping). Dimension names are the field's.

``batch`` rows, ``heads`` query heads, ``kv_heads`` key/value heads, ``tokens`` stored tokens,
``new`` tokens of one append or one forward, ``head_dim`` / ``value_dim`` numbers per head.
"""

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int64

Keys: TypeAlias = Float[torch.Tensor, "batch kv_heads tokens head_dim"]
Values: TypeAlias = Float[torch.Tensor, "batch kv_heads tokens value_dim"]
NewKeys: TypeAlias = Float[torch.Tensor, "batch kv_heads new head_dim"]
NewValues: TypeAlias = Float[torch.Tensor, "batch kv_heads new value_dim"]
Queries: TypeAlias = Float[torch.Tensor, "batch heads new head_dim"]
TokenIds: TypeAlias = Int64[torch.Tensor, "batch tokens"]
RowIndex: TypeAlias = Int[torch.Tensor, " rows"]
TokenIndex: TypeAlias = Int[torch.Tensor, " kept"]
PaddingMask: TypeAlias = Bool[torch.Tensor, "batch tokens"] | Int[torch.Tensor, "batch tokens"]
