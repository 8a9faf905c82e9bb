"""A gated recurrent cache (GRC) in self-attention: a memory that training fills.

    grc = mnemon.memory.add_grc(model, ratio=0.5, memory_length=64)

- `cache`, `fifo`: the buffer and its update; `interpolate`, `ranks`: tokens to slots, means
- `branch`: reading it; `attention`: a self-attention with it; `hosts`: one that may have it
- `adding`, `report`, `settings`, `saved`: into a model, out again, to a file
- `blocks`: small blocks to put it into; `experiments`: what it brings

Source: Cached Transformers, arXiv 2312.12742.
"""

from mnemon.memory.grc.adding import GRC, add_grc, remove_grc
from mnemon.memory.grc.attention import GRCAttention, SelfAttention
from mnemon.memory.grc.branch import Grid, MemoryBranch
from mnemon.memory.grc.cache import GatedRecurrentCache, MemoryCache, Step
from mnemon.memory.grc.fifo import FifoCache
from mnemon.memory.grc.report import Place, Report
from mnemon.memory.grc.settings import Settings

__all__ = [
    "GRC",
    "FifoCache",
    "GRCAttention",
    "GatedRecurrentCache",
    "Grid",
    "MemoryBranch",
    "MemoryCache",
    "Place",
    "Report",
    "SelfAttention",
    "Settings",
    "Step",
    "add_grc",
    "remove_grc",
]
