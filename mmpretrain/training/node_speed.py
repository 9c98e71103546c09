"""How fast this node's ranks multiply and exchange, as one line of JSON: `torchrun -m mmpretrain.training.node_speed`.

Enter: the ranks of one node. Leave: TFLOP/s of the slowest rank's matmul, GB/s of an all-reduce over all of them.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mmpretrain.core.collectives import all_reduce_max
from mmpretrain.training.ranks import join, leave

_REPEATS = 20


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of one call, on the slowest rank. Communicates."""
    for measured in (False, True):
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if measured:
            spent = torch.tensor([(time.perf_counter() - begin) / _REPEATS], device=device)
    return all_reduce_max(spent).item()


def measure(device: torch.device) -> dict[str, float]:
    """Speeds by name. Communicates."""
    size, numbers = (8192, 2**26) if device.type == "cuda" else (256, 2**16)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    flops = 2 * size**3 / _seconds(lambda: matrix @ matrix, device)
    payload = torch.zeros(numbers, device=device)
    exchange_s = _seconds(lambda: dist.all_reduce(payload), device)
    return {"matmul TFLOP/s": flops / 1e12, "all-reduce GB/s": payload.nbytes / exchange_s / 1e9}


if __name__ == "__main__":
    world, own_device = join(timeout_s=60.0)
    speeds = measure(own_device)
    if world.is_main:
        sys.stdout.write(json.dumps(speeds) + "\n")
    leave()
