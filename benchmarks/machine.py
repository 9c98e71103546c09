"""The one core that CPU seconds are measured on, and what a record says of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def stay_on_one_core() -> None:
    """This process and its threads, PyTorch's own among them."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def machine(*packages: str) -> dict[str, object]:
    """Processor, load, and the versions of Python and of these packages."""
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "loadavg": os.getloadavg(),
        "versions": {package: version(package) for package in packages},
    }
