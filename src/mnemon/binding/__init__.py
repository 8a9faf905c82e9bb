"""Joins a model and a cache: `attach`, `detach` and `prefill`."""

from mnemon.binding.attachment import Attachment, attach, detach
from mnemon.binding.chunks import prefill
from mnemon.binding.reuse import Stats

__all__ = ["Attachment", "Stats", "attach", "detach", "prefill"]
