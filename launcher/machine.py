"""`mmpretrain doctor`: is this machine fit to submit from, or to train on.

Enter: nothing. Leave: a line for each thing looked at, good or not, with what to do where it is not.
"""

import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from launcher import slurm_commands
from mmpretrain.core.errors import ClusterError

_PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "wandb", "pydantic")
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'LOOK'}  {self.text}"


def doctor_machine(folder: Path) -> list[Finding]:
    """Everything that often goes wrong; `folder` is where runs are to be written."""
    return [*_python(), *_gpus(), *_scheduler(), *_disk(folder), *_network(), *_environment()]


def _python() -> Iterator[Finding]:
    yield Finding((3, 11) <= sys.version_info[:2] <= (3, 13), f"Python {sys.version.split()[0]} at {sys.executable}")
    for name in _PACKAGES:
        try:
            yield Finding(True, f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(False, f"{name} is not installed; run make setup")


def _gpus() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding(True, "no NVIDIA driver: ranks compute on processors here")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    rows = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    said = f"{len(rows)} GPUs: {rows[0]}" if rows else "nvidia-smi shows no GPU; is the driver loaded?"
    yield Finding(listed.returncode == 0 and bool(rows), said)


def _scheduler() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding(True, "no Slurm on this machine: --to local works, --to slurm does not")
        return
    try:
        rows = slurm_commands.call("sinfo", "--noheader", "--format=%R %a %F").splitlines()
    except ClusterError as fault:
        yield Finding(False, str(fault))
        return
    for row in rows:
        partition, state, nodes = row.split()
        yield Finding(state == "up", f"Slurm partition {partition} is {state}; nodes in use/idle/other/all: {nodes}")


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    writable, free = os.access(there, os.W_OK), shutil.disk_usage(there).free / _GIB
    yield Finding(writable, f"{there} is {'writable' if writable else 'not writable; set output elsewhere'}")
    yield Finding(free > 10, f"{free:.0f} GiB free there")
    shared = shutil.disk_usage("/dev/shm").free / _GIB
    yield Finding(shared > 0.25, f"{shared:.1f} GiB of shared memory free; data workers hand batches on in it")


def _network() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(False, f"this host's name {name} has no address; ranks of other nodes may not find it")
        return
    yield Finding(True, f"host {name} is {address}")


def _environment() -> Iterator[Finding]:
    threads = os.environ.get("OMP_NUM_THREADS")
    said = f"is {threads}" if threads else "is not set; set it to 1 for ranks that torchrun starts on processors"
    yield Finding(threads is not None, f"OMP_NUM_THREADS {said}")
    for module in ("mmpretrain", "data_pipeline", "launcher"):
        yield Finding(True, f"{module} from {Path(str(importlib.import_module(module).__file__)).parent}")
