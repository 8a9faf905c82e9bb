"""Where bytes live: on the device, in the host's memory, on disk. Opaque bytes, no tensors of ours.

Imports torch and `errors` only; knows neither keys nor values, neither layers nor attention.

    base       a tier: puts bytes away, streams them back in order, reads ahead
    device     bytes stay where the model computes
    host       bytes in main memory: pinned, copied on a stream, where the model is on CUDA
    disk       bytes in a file without a name, behind a bound on memory
    ahead      the ring of buffers in which what comes next is read
    segments   that file: extents, direct reads, what a full disk means
"""

from mnemon.tiers.base import Record, Settle, Tier, Tile, nothing_runs
from mnemon.tiers.device import DeviceTier
from mnemon.tiers.disk import DiskTier
from mnemon.tiers.host import HostTier

__all__ = [
    "DeviceTier",
    "DiskTier",
    "HostTier",
    "Record",
    "Settle",
    "Tier",
    "Tile",
    "nothing_runs",
]
