"""Launching real ranks that form one gloo group, one thread each; their output is kept for the failure message.

`run_ranks` forks them from a server that has imported everything and computed nothing, so that a launch costs no
imports and launches share no state.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore, is_initialized

from mmpretrain.core.collectives import barrier
from mmpretrain.training.ranks import join, leave

TIMEOUT_S = 600
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "PYTHONUNBUFFERED": "1",
}
"""One thread a rank, no GPU, no W&B account, no hub."""
PRELOAD = [
    "without_collections",
    "mmpretrain.training.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it with the first ZeRO engine
    "peft",
    "transformers.modeling_utils",
]


def run_module(module: str, arguments: Sequence[str]) -> None:
    """What `python -m module arguments` does; a target for `run_ranks`."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_ranks(ranks: int, target: Callable[..., None], *arguments: object) -> None:
    """Call `target`, a function of a module, on each rank of a group; fails with the output when one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    os.environ.update(ENVIRONMENT)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(ranks)]
        started = [
            context.Process(target=_run_rank, args=(rank, ranks, store.port, logs[rank], target, arguments))
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        failed = _first_failure(started)
        shown = "\n".join(log.read_text()[-6000:] for log in logs if log.exists())
    assert failed is None, f"rank {failed} of {ranks} in {target.__name__} failed:\n{shown}"


def _first_failure(processes: Sequence[ForkServerProcess]) -> int | None:
    """Wait for all; the rank that failed first, after which the others are killed."""
    deadline = time.monotonic() + TIMEOUT_S
    running = dict(enumerate(processes))
    while running:
        ready = wait([process.sentinel for process in running.values()], max(0.0, deadline - time.monotonic()))
        ended = [rank for rank, process in running.items() if process.sentinel in ready]
        failures = [rank for rank in ended if running.pop(rank).exitcode != 0]
        if failures or not ready:
            for process in running.values():
                process.kill()
                process.join()
            return failures[0] if failures else min(running)
    return None


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of one node; the store at `port` is in the process that launches, as torchrun's is."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run_rank(
    rank: int, ranks: int, port: int, log: Path, target: Callable[..., None], arguments: Sequence[object]
) -> None:
    """A rank's whole life; a target that left its group by itself, as training does, is as well."""
    gc.freeze()  # DeepSpeed collects for each engine, and need not look through what the libraries made
    gc.enable()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(rank_environment(rank, ranks, port))
    join()
    target(*arguments)
    if is_initialized():
        barrier()
        leave()
