"""Launching real ranks: torchrun on gloo, one thread each, output kept for the failure message."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 600


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a rank, no GPU, no W&B account, no hub."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **fixed, **(extra or {})}


def torchrun_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """`arguments` is a script, or -m and a module, with what follows it."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]


def run_ranks(ranks: int, arguments: Sequence[str], cwd: Path | None = None) -> str:
    """Run to the end and return the output; fails with it when the exit code is not 0."""
    done = subprocess.run(
        torchrun_command(ranks, arguments),
        env=environment(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{ranks} ranks of {arguments} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout
