"""What a packed format is, as the formats see it; `mnemon.schemes` defines it without torch."""

from mnemon.schemes import BLOCK_TOKENS, CODES, Scheme, default_scheme, padded_width

__all__ = ["BLOCK_TOKENS", "CODES", "Scheme", "default_scheme", "padded_width"]
