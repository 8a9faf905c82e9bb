"""What `generate` hands tokens to while it makes them, and the bars that loading draws."""

from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

__all__ = ["BaseStreamer", "disable_progress_bar"]


def disable_progress_bar() -> None:
    """Let transformers draw no progress bars; who loads a model draws its own."""
    logging.disable_progress_bar()
