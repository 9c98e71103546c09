"""Slurm's own commands, with their refusals in words.

Enter: arguments. Leave: what the command printed. Refused: a machine without Slurm, and whatever Slurm refuses, with
its reason; a controller that does not answer is told apart from one that refuses. No accounting database is needed:
squeue and scontrol alone are asked.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mmpretrain.core.errors import ClusterError

AnswerT = TypeVar("AnswerT")

TIMEOUT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_SILENCE = re.compile(r"contact slurm controller|timed out|Unexpected message received|Zero Bytes", re.IGNORECASE)
"""What the commands of Slurm say where the controller is down, slow or just starting."""


class NoAnswer(ClusterError):
    """The controller did not answer, which says nothing about what was asked."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    job: str
    array_name: str
    """The same for a single job; 12_3 for task 3 of array 12."""
    state: str
    """E.g. PENDING, RUNNING, COMPLETING."""
    reason: str
    nodes: str
    time_left_s: int | None


def call(*arguments: str) -> str:
    """Run a command of Slurm and return what it printed."""
    if shutil.which(arguments[0]) is None:
        raise ClusterError(
            f"there is no {arguments[0]} on this machine; submit from a login node of the cluster, or use --to local "
            f"(a cluster to try things on: slurm/dev_cluster.sh)"
        )
    # sbatch would hand the place in an array on to a job that is no task of it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    try:
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as fault:
        raise NoAnswer(f"{arguments[0]} did not answer within {TIMEOUT_S:g} s; is slurmctld up?") from fault
    if done.returncode:
        reason = _reason(done.stderr or done.stdout)
        if _SILENCE.search(reason):
            raise NoAnswer(f"{arguments[0]} was given no answer ({reason}); is slurmctld up?")
        raise ClusterError(f"Slurm refuses {arguments[0]}: {reason}")
    return done.stdout


def patiently(ask: Callable[[], AnswerT], patience_s: float) -> AnswerT:
    """What `ask` returns, asked again at growing intervals until there is an answer or `patience_s` have passed."""
    end, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return ask()
        except NoAnswer:
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _reason(text: str) -> str:
    """The last words of Slurm, without the names of its commands."""
    lines = [re.sub(r"^(\w+: )?(error|fatal): ", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.removeprefix("allocation failure: ") for line in lines)) or "it gives no reason"


def queued_job(job: str) -> QueuedJob | None:
    """One job, or None once Slurm has forgotten it."""
    try:
        rows = queued_jobs(["--jobs", job])
    except ClusterError as fault:
        if "Invalid job id" in str(fault):
            return None
        raise
    return rows[0] if rows else None


def queued_jobs(selection: Sequence[str]) -> list[QueuedJob]:
    """Jobs that wait, run or end."""
    text = call("squeue", "--noheader", "--array", "--format=%A|%i|%T|%r|%N|%L", *selection)
    return [_parse(line) for line in text.splitlines() if line.strip()]


def _parse(line: str) -> QueuedJob:
    job, array_name, state, reason, nodes, left = line.strip().split("|")
    return QueuedJob(job, array_name, state, reason, nodes, _seconds(left))


def _seconds(text: str) -> int | None:
    """Seconds of D-HH:MM:SS, HH:MM:SS or M:SS; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def minutes_spent(job: str) -> int:
    """Whole minutes that a job has run."""
    return (_seconds(call("squeue", "--noheader", f"--jobs={job}", "--format=%M")) or 0) // 60


def hostnames(nodes: str) -> list[str]:
    """n[1-3] as single names."""
    return call("scontrol", "show", "hostnames", nodes).split()


def address_of(node: str) -> str:
    """The address by which other nodes reach a node."""
    match = re.search(r"\bNodeAddr=(\S+)", call("scontrol", "show", "node", "--oneliner", node))
    return match[1] if match else node


def silent_nodes(nodes: Sequence[str]) -> list[str]:
    """Those that Slurm takes for down, or that no longer answer it."""
    text = call("scontrol", "show", "node", "--oneliner", ",".join(nodes))
    found = []
    for line in text.splitlines():
        name, state = re.search(r"\bNodeName=(\S+)", line), re.search(r"\bState=(\S+)", line)
        if name and state and re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", state[1]):
            found.append(name[1])
    return found
