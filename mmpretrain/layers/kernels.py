"""For which device a computation is laid out: the one that holds the tensors or, while a run is planned, another.

Enter: a device. Leave: its type, by which layers choose between ways to compute the same. Refuses nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_planned: str | None = None


def kernel_device(device: torch.device) -> str:
    """The type of device whose kernels are to run: "cpu", "cuda", ..."""
    return device.type if _planned is None else _planned


@contextmanager
def laid_out_for(device_type: str) -> Iterator[None]:
    """Inside, computations take the form they have on such a device, wherever their tensors lie."""
    global _planned
    before, _planned = _planned, device_type
    try:
        yield
    finally:
        _planned = before
