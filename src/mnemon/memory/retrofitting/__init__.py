"""Dynamic Memory Compression and Sparsification: a model that compresses its own cache."""

from mnemon.memory.retrofitting.adapter import load_retrofitted, save_retrofitted
from mnemon.memory.retrofitting.attaching import attach_compression, detach_compression
from mnemon.memory.retrofitting.measuring import Measured, calibrate, measure
from mnemon.memory.retrofitting.options import RetrofitOptions
from mnemon.memory.retrofitting.retrofit import retrofit
from mnemon.memory.retrofitting.trainer import Progress, Retrofitter

__all__ = [
    "Measured",
    "Progress",
    "RetrofitOptions",
    "Retrofitter",
    "attach_compression",
    "calibrate",
    "detach_compression",
    "load_retrofitted",
    "measure",
    "retrofit",
    "save_retrofitted",
]
