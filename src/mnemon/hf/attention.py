"""mnemon's attention for transformers: the functions, their registration, and switching them on."""

from mnemon.hf.attention_functions import attention_forward, eager_attention_forward, register
from mnemon.hf.enabling import Restore, enable
from mnemon.hf.masks import ATTENTION_NAME, EAGER_NAME

__all__ = [
    "ATTENTION_NAME",
    "EAGER_NAME",
    "Restore",
    "attention_forward",
    "eager_attention_forward",
    "enable",
    "register",
]
