"""Names of transformers that other rooms use and that its releases spell differently."""

from mnemon.hf.versions import current

__all__ = ["PreTrainedConfig", "attention_implementation", "removed_by"]

PreTrainedConfig = current.PreTrainedConfig
"""The class of every config (`PretrainedConfig` in 4.57)."""

removed_by = current.tokens_to_remove
"""What the argument of ``crop`` asks for: ``(given, num_tokens) -> number of tokens to remove``."""


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Which attention function a model of `config` asks transformers for."""
    name: str | None = config._attn_implementation
    return name
