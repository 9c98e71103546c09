"""`python -m launcher.preflight RUN ATTEMPT`: is this node able to take part; a moment's work before each attempt.

Enter: the job of a run folder. Leave: `preflight/attempt-N/NODE.json`, one a node, with what it is and what is wrong
with it. The supervisor compares them: nodes unlike most others are at fault, and so is one whose GPUs or driver are;
any other fault of all nodes is the job's.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from launcher import gpu_health
from launcher.spec import JobSpec, read_spec
from mmpretrain.core import run_files
from mmpretrain.core.run_files import node_name

MIB = 2**20
CLOCK_TOLERANCE_S = 30.0
"""Nodes do not look at their clocks at the same moment."""
MIN_DISK_MIB, MIN_SHM_MIB_PER_RANK, MIN_INODES = 64, 32, 1000
_PACKAGES = ("torch", "deepspeed", "numpy", "pydantic")
_FIRST_PORT, _LAST_PORT = 20000, 32000


@dataclass(frozen=True)
class NodeReport:
    """What one node found."""

    node: str
    clock: float
    port: int
    """One that is free for the rendezvous."""
    versions: dict[str, str]
    """Must be the same on all nodes: packages, code, config, driver."""
    speeds: dict[str, float]
    """Must not be far below the median of all nodes."""
    faults: list[str]
    """Of what nodes may share: disks, shards, the run's settings."""
    gpu_faults: list[str] = field(default_factory=list)
    """Of its GPUs and their driver, which are no other node's."""


@dataclass(frozen=True)
class Verdict:
    """What the reports of all nodes come to."""

    port: int
    bad_nodes: tuple[str, ...]
    """Nodes to be replaced; empty where the fault is everywhere the same."""
    faults: tuple[str, ...]


def reports_folder(run: Path, attempt: int) -> Path:
    return run / "preflight" / f"attempt-{attempt}"


def judge(nodes: Sequence[str], reports: Sequence[NodeReport]) -> Verdict:
    """Compare the nodes; the first is rank 0's."""
    by_node = {report.node: report for report in reports}
    found = {node: list(_faults(node, by_node)) for node in nodes}
    bad = tuple(node for node in nodes if found[node])
    port = by_node[nodes[0]].port if nodes[0] in by_node else _FIRST_PORT
    of_gpus = {text for report in reports for text in report.gpu_faults}
    common = set.intersection(*(set(texts) for texts in found.values())) - of_gpus
    faults = sorted(common) or [f"{node}: {text}" for node in bad for text in found[node]]
    return Verdict(port, () if common else bad, tuple(faults))


def _faults(node: str, reports: dict[str, NodeReport]) -> Iterator[str]:
    if node not in reports:
        yield "gave no report in time"
        return
    mine = reports[node]
    yield from (*mine.faults, *mine.gpu_faults)
    for name in sorted({name for report in reports.values() for name in report.versions}):
        values = Counter(report.versions.get(name, "none") for report in reports.values())
        usual, here = values.most_common(1)[0][0], mine.versions.get(name, "none")
        if here != usual:
            yield f"has {name} {here}, most nodes have {usual}"
    clocks = sorted(report.clock for report in reports.values())
    away = mine.clock - clocks[len(clocks) // 2]
    if abs(away) > CLOCK_TOLERANCE_S:
        yield f"its clock is {away:+.0f} s away from the others"
    yield from gpu_health.slow(mine.speeds, [report.speeds for report in reports.values()])


def read_reports(run: Path, attempt: int) -> list[NodeReport]:
    paths = sorted(reports_folder(run, attempt).glob("*.json"))
    return [NodeReport(**json.loads(path.read_text())) for path in paths]


def check_node(spec: JobSpec, attempt: int) -> NodeReport:
    """Look at this node."""
    faults: list[str] = []
    checks: tuple[Callable[[JobSpec], Iterator[str]], ...] = (_disk, _shared_memory, _checkpoints, _shards)
    for check in checks:
        faults += check(spec)
    health = gpu_health.check(spec) if spec.gpus_per_node else gpu_health.Health()
    versions = _versions(spec) | health.versions
    return NodeReport(
        node_name(), time.time(), _free_port(attempt), versions, health.speeds, faults, gpu_faults=health.faults
    )


def _versions(spec: JobSpec) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _PACKAGES}
    versions["python"] = sys.version.split()[0]
    versions["config"] = spec.config_hash
    if spec.code is not None:
        versions["code"] = code_hash(spec.code)
    return versions


def code_hash(folder: Path) -> str:
    """Twelve hex digits of all Python files below a folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _disk(spec: JobSpec) -> Iterator[str]:
    newest = max(run_files.saved_checkpoints(spec.run / run_files.CHECKPOINTS), default=None)
    size = 0 if newest is None else sum(path.stat().st_size for path in newest.iterdir())
    needed, free = MIN_DISK_MIB + 2 * size // MIB, shutil.disk_usage(spec.run).free // MIB
    if free < needed:
        yield f"{spec.run} has {free} MiB free, two checkpoints need {needed}; free space or quota there"
    inodes = os.statvfs(spec.run)
    if inodes.f_files and inodes.f_favail < MIN_INODES:
        yield f"{spec.run} has {inodes.f_favail} inodes left; delete small files there"


def _shared_memory(spec: JobSpec) -> Iterator[str]:
    needed = MIN_SHM_MIB_PER_RANK * spec.ranks_per_node
    free = shutil.disk_usage("/dev/shm").free // MIB
    if free < needed:
        yield f"/dev/shm has {free} MiB free, {spec.ranks_per_node} ranks need {needed}; containers: raise --shm-size"


def _checkpoints(spec: JobSpec) -> Iterator[str]:
    """A checkpoint counts from its rename on, so that must work here."""
    folder = spec.run / run_files.CHECKPOINTS
    trial, renamed = folder / f".preflight-{node_name()}", folder / f".preflight-{node_name()}-renamed"
    try:
        trial.mkdir(parents=True, exist_ok=True)
        with (trial / "file").open("w") as file:
            file.write("whole")
            os.fsync(file.fileno())
        trial.rename(renamed)
        if (renamed / "file").read_text() != "whole":
            yield f"{folder} does not give back what was written"
    except OSError as fault:
        yield f"{folder} cannot be written and renamed in ({fault.strerror})"
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)


def _shards(spec: JobSpec) -> Iterator[str]:
    for shard in spec.shards:
        try:
            with Path(shard).open("rb") as file:
                if len(file.read(512)) < 512:
                    yield f"shard {shard} holds no tar header"
        except OSError as fault:
            yield f"shard {shard} cannot be read ({fault.strerror}); is its file system mounted?"


def _free_port(attempt: int) -> int:
    """Another one for each attempt, since the last one's may still be held."""
    span = _LAST_PORT - _FIRST_PORT
    start = (os.getpid() * 31 + attempt * 101) % span
    for offset in range(span):
        port = _FIRST_PORT + (start + offset) % span
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
            return port
    return _FIRST_PORT


def main(run: Path, attempt: int) -> None:
    """Look at this node and leave its report."""
    report = check_node(read_spec(run), attempt)
    folder = reports_folder(run, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    run_files.replace(folder / f"{report.node}.json", json.dumps(asdict(report)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
