"""The health of a node's GPUs: what nvidia-smi tells, and what a matmul and an all-reduce measure.

Enter: how many GPUs a job wants of this node. Leave: faults in words, the driver's version, speeds. Speeds mean nothing
alone; a node is slow when it falls far below the median of all nodes.
"""

import json
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.spec import JobSpec

SLOW_SHARE = 0.7
"""Of the median speed; below it a node is at fault."""
_FIELDS = (
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Health:
    """Of all GPUs of a node."""

    versions: dict[str, str] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def check(spec: JobSpec) -> Health:
    """Ask the driver, then compute; a node whose driver complains computes nothing."""
    if shutil.which("nvidia-smi") is None:
        return Health(faults=["has no nvidia-smi, so no NVIDIA driver"])
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Health(faults=[f"nvidia-smi did not answer within {_TIMEOUT_S:g} s"])
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
    faults = list(driver_faults(rows, spec.gpus_per_node))
    if faults:
        return Health(faults=faults)
    return _measure(spec, {"driver": rows[0][0]})


def driver_faults(rows: Sequence[Sequence[str]], wanted: int) -> Iterator[str]:
    """What is wrong, given a row of `_FIELDS` for each GPU; "[N/A]" is said by cards without the feature."""
    if len(rows) < wanted:
        yield f"shows {len(rows)} GPUs, the job wants {wanted}"
    for number, (_, uncorrected, pending, failure) in enumerate(rows):
        if uncorrected.isdigit() and int(uncorrected):
            yield f"GPU {number} has {uncorrected} uncorrected memory errors since it was reset"
        if pending in ("1", "Yes"):
            yield f"GPU {number} waits for a reset to remap a bad memory row"
        if failure in ("1", "Yes"):
            yield f"GPU {number} could not remap a bad memory row"


def _measure(spec: JobSpec, versions: dict[str, str]) -> Health:
    ranks = f"--nproc-per-node={spec.ranks_per_node}"
    program = ["-m", "torch.distributed.run", "--standalone", ranks, "-m", "mmpretrain.training.node_speed"]
    try:
        done = subprocess.run([spec.python, *program], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        speeds = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return Health(versions, faults=["a matmul and an all-reduce on its GPUs did not end well"])
    return Health(versions, speeds)


def slow(mine: Mapping[str, float], of_all: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What this node does far slower than the median."""
    for name, speed in mine.items():
        median = statistics.median(other[name] for other in of_all if name in other)
        if speed < SLOW_SHARE * median:
            yield f"{name} is {speed:.3g}, the median of the nodes {median:.3g}"
