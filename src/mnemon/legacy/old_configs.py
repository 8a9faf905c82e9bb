"""What every config had: old remote code reads it, and transformers decides by it."""

import copy
from typing import Any

from mnemon.hf.names import PreTrainedConfig
from mnemon.legacy.callers import is_remote
from mnemon.legacy.patches import Patches
from mnemon.legacy.warning import Notices

__all__ = ["install"]

#: Defaults of ``PretrainedConfig`` in transformers 4.57 that its base class no longer has. Weights
#: are tied by one of them: without it a model that relied on the default has a random head.
_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "bos_token_id": None,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "eos_token_id": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "is_decoder": False,
    "pad_token_id": None,
    "prefix": None,
    "pruned_heads": {},
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}


def install(patches: Patches, notices: Notices) -> None:
    base = PreTrainedConfig()
    missing = {name: value for name, value in _DEFAULTS.items() if not hasattr(base, name)}
    if not missing or hasattr(PreTrainedConfig, "__getattr__"):
        return

    def __getattr__(self: Any, name: str) -> Any:
        """Only what reading did not find otherwise, and only for configs of remote code."""
        if name in missing and is_remote(type(self)):
            return copy.copy(missing[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    patches.put(PreTrainedConfig, "__getattr__", __getattr__)
