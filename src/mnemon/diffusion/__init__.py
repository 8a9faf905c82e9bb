"""Caching between denoising steps of diffusion transformers.

    import mnemon.diffusion
    with mnemon.diffusion.attach(pipe, "taylor", order=1, interval=3) as cached:
        images = pipe(...).images
    print(cached.report())

- `attachment`, `attached`, `patching`: a method on one model; `clock`, `listening`: runs, steps and
  guidance branches
- `sites`: where in which model; `hidden`, `outputs`: what passes there
- `methods`: one file each; `router`: a learned schedule as a file
- `macs`, `report`: what it saved
- `digits`: the bundled DiT; `diffmoe`: mixture-of-experts feed-forwards
"""

from mnemon.diffusion.attachment import Attachment, attach, detach
from mnemon.diffusion.methods.base import Method, Session
from mnemon.diffusion.methods.registry import METHODS, make_method
from mnemon.diffusion.report import Report
from mnemon.diffusion.router import Router, load_router
from mnemon.diffusion.sites import Sites, find_sites

__all__ = [
    "METHODS",
    "Attachment",
    "Method",
    "Report",
    "Router",
    "Session",
    "Sites",
    "attach",
    "detach",
    "find_sites",
    "load_router",
    "make_method",
]
