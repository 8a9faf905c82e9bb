"""On what a measurement was taken: versions, processor, threads, date, command line."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment"]

PACKAGES = ("mnemon", "torch", "transformers", "safetensors", "optimum-quanto", "hqq")


def environment(*packages: str) -> dict[str, Any]:
    """What a reader needs to place a figure; no host name, no user, no path.

    Args:
        packages: whose versions matter too.
    """
    import torch

    load = getattr(os, "getloadavg", None)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["mnemon", *_arguments()]),
        "python": platform.python_version(),
        **{name: found for name in (*PACKAGES, *packages) if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors_usable": _usable(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(load()[0], 1) if load else None,
        "accelerators": devices,
    }


def _arguments() -> list[str]:
    """The command line, folders cut from paths: a report may be sent to others."""
    return [Path(word).name if os.sep in word else word for word in sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _usable() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
