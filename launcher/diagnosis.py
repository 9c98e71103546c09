"""`mmpretrain doctor RUN`: what is wrong with a run, most likely, and the next command to type.

Enter: a run folder. Leave: findings in words, each with a command. The last lines of the job's log, the history, the
stacks of a hang and the outcome are looked at, in that order of how sure they make us.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import bad_nodes, pace
from launcher.history import Attempt, Ending, History
from launcher.spec import job_file, read_spec
from launcher.status import RunStatus, status_of
from mmpretrain.core import run_files

_LOG_BYTES = 200_000


@dataclass(frozen=True)
class Sign:
    """Words in a log that tell a cause."""

    pattern: str
    cause: str
    advice: str


SIGNS = (
    Sign(
        r"CUDA out of memory|OutOfMemoryError",
        "a GPU ran out of memory",
        "mmpretrain submit CONFIG ... micro_batch_size=HALF engine.activation_checkpointing=block",
    ),
    Sign(
        r"oom[-_ ]kill|Out of memory: Killed|Exceeded job memory limit",
        "the kernel killed a process for want of host memory",
        "raise memory_per_node in the cluster file, or lower data.workers and data.prefetch",
    ),
    Sign(
        r"NVRM: Xid|Xid \(PCI",
        "a GPU reported a hardware fault (Xid)",
        "add the node to exclude: in the cluster file and tell the administrators",
    ),
    Sign(
        r"uncorrectable ECC|ECC error",
        "GPU memory is damaged (ECC)",
        "add the node to exclude: in the cluster file and tell the administrators",
    ),
    Sign(
        r"NCCL.*(timed out|timeout)|Watchdog caught collective operation timeout",
        "a collective never ended: one rank did not come",
        "mmpretrain logs RUN --rank N for the rank that stands elsewhere; stacks/ has all of them",
    ),
    Sign(
        r"NCCL WARN|NCCL error|ncclSystemError|ncclInternalError",
        "NCCL failed",
        "set NCCL_DEBUG: INFO under environment: in the cluster file, and see slurm/README.md on networks",
    ),
    Sign(
        r"No space left on device|Disk quota exceeded",
        "the disk is full",
        "free space or quota, then: mmpretrain submit --again RUN",
    ),
    Sign(
        r"Stale file handle|Input/output error|Transport endpoint",
        "the file system failed",
        "ask the administrators about it, then: mmpretrain submit --again RUN",
    ),
    Sign(
        r"Address already in use",
        "another process holds the rendezvous port",
        "nothing: the next attempt takes another port",
    ),
    Sign(
        r"ModuleNotFoundError: No module named '([\w.]+)'",
        "a Python package is missing on the nodes",
        "add what loads it to setup: in the cluster file",
    ),
    Sign(
        r"Bus error|/dev/shm",
        "shared memory is too small for the data workers",
        "containers: raise --shm-size; or lower data.workers",
    ),
    Sign(r"Segmentation fault|SIGSEGV", "native code crashed", "mmpretrain logs RUN; the stack is above the message"),
)


def doctor_run(run: Path) -> str:
    """Findings and the next command."""
    status = status_of(run)
    lines = [f"{run.name}: {status.state}" + (f", {status.detail}" if status.detail else "")]
    lines += [f"  - {finding}" for finding in findings(run, status)]
    lines += [f"next: {_next_command(run, status)}"]
    return "\n".join(lines)


def findings(run: Path, status: RunStatus) -> Iterator[str]:
    """Everything that can be seen, most telling first."""
    past = History(run).read()
    if past and past[-1].ending is Ending.UNFIT:
        yield f"the nodes did not pass the check before training: {past[-1].reason}"
    failed = status.state in ("stopped", "crashed", "fatal", "hung", "lost") or (
        bool(past) and past[-1].ending is Ending.CRASHED
    )
    if failed:
        for sign, line in _signs(run):
            yield f"{sign.cause}: {line!r}; {sign.advice.replace('RUN', str(run))}"
    for attempt in past:
        if attempt.ending is Ending.HUNG:
            folder = run / run_files.STACKS / f"attempt-{attempt.attempt}"
            yield f"attempt {attempt.attempt} hung: {attempt.reason}; stacks of all ranks in {folder}"
    outcome = run_files.read_outcome(run)
    if outcome is not None and outcome.state == "fatal":
        yield f"the run gave up after step {outcome.step}: {outcome.message}"
    if remembered := bad_nodes.known(run.parent):
        yield f"nodes avoided since they failed a check: {', '.join(remembered)} ({run.parent / bad_nodes.FILE})"
    warned = list(_pace_warnings(run, past, status))
    yield from warned
    beat = status.heartbeat
    if beat is not None and status.state == "running" and beat.step_s is not None:
        well = "" if warned else "; all is well"
        yield f"{beat.step} of {beat.last_step} steps done, {beat.step_s:.3g} s a step{well}"


def _pace_warnings(run: Path, past: list[Attempt], status: RunStatus) -> Iterator[str]:
    """Of a run that has still to go on."""
    found = pace.measured(past, status.heartbeat)
    if found is not None and status.state != "completed" and job_file(run).is_file():
        yield from pace.warnings(read_spec(run), found)


def _signs(run: Path) -> Iterator[tuple[Sign, str]]:
    """Each sign at its last line in the newest part of the job's log."""
    path = run / "logs" / "job.log"
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for sign in SIGNS:
        for line in reversed(lines):
            if re.search(sign.pattern, line):
                yield sign, line.strip()[-160:]
                break


def _next_command(run: Path, status: RunStatus) -> str:
    commands = {
        "queued": f"mmpretrain status {run}   (nothing to do but wait, or: squeue --start)",
        "starting": f"mmpretrain logs -f {run}",
        "running": f"mmpretrain top {run}",
        "ending": f"mmpretrain status {run}",
        "completed": f"mmpretrain publish {run} --to-dir published/{run.name}",
    }
    if status.state in commands:
        return commands[status.state]
    command = f"mmpretrain submit --again {run}" if job_file(run).is_file() else "the command that started it, again"
    saved = run_files.saved_checkpoints(run / run_files.CHECKPOINTS)
    return f"{command}   ({'it continues from its newest checkpoint' if saved else 'it has none to continue from'})"
