"""The nodes a supervisor has, and what it can do with them; here those of the local machine.

Enter: a JobSpec. Leave: processes: the ranks of an attempt, or a small program once on each node. An allocation knows
how to kill an attempt for good, what the scheduler wants when a signal comes, and how to queue the job again.
"""

import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Protocol

from launcher import render
from launcher.spec import JobSpec
from mmpretrain.core.run_files import node_name

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
TOOL_TIMEOUT_S = 180.0
TIME_LIMIT, PREEMPTION, ENDED = "time limit", "preemption", "the scheduler ends the job"
SCHEDULERS_REASONS = (TIME_LIMIT, PREEMPTION, ENDED)


class Allocation(Protocol):
    """What a supervisor needs of the machines it was given."""

    @property
    def job(self) -> str:
        """The scheduler's number of this job."""
        ...

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names, the one of rank 0 first."""
        ...

    @property
    def requeues(self) -> bool:
        """Whether a job that was asked to stop goes on later by itself."""
        ...

    def start(self, attempt: int, port: int) -> subprocess.Popen[bytes]:
        """Start all ranks."""
        ...

    def on_every_node(self, name: str, arguments: Sequence[str]) -> None:
        """Run `python -m ...` once on each node, bounded in time; what it found, it leaves in the run folder."""
        ...

    def kill(self, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """End an attempt that does not end by itself."""
        ...

    def silent_nodes(self) -> list[str]:
        """Nodes that the scheduler cannot reach."""
        ...

    def stop_reason(self, number: int) -> str:
        """What a signal to the supervisor means."""
        ...

    def requeue(self) -> bool:
        """Queue the job again; False where that is not possible or not wanted."""
        ...

    def replace_nodes(self, bad: Sequence[str]) -> bool:
        """Queue the job again on other nodes; False where that is not possible."""
        ...

    def tell_progress(self, text: str) -> None:
        """Show how far the run is where the scheduler shows its jobs."""
        ...


class LocalAllocation:
    """This machine alone: nothing to queue for, so a stop is a stop."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec

    @property
    def job(self) -> str:
        return str(os.getpid())

    @property
    def nodes(self) -> tuple[str, ...]:
        return (node_name(),)

    @property
    def requeues(self) -> bool:
        return False

    def start(self, attempt: int, port: int) -> subprocess.Popen[bytes]:
        command = render.local_step(self.spec, port, attempt)
        return subprocess.Popen(command, env=self._environment(), start_new_session=True, preexec_fn=_die_with_parent)

    def on_every_node(self, name: str, arguments: Sequence[str]) -> None:
        command = [self.spec.python, "-m", *arguments]
        try:
            subprocess.run(command, env=self._environment(), timeout=TOOL_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s", name, TOOL_TIMEOUT_S)

    def kill(self, attempt: int, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def silent_nodes(self) -> list[str]:
        return []

    def stop_reason(self, number: int) -> str:
        return f"signal {signal.Signals(number).name}"

    def requeue(self) -> bool:
        return False

    def replace_nodes(self, bad: Sequence[str]) -> bool:
        return False

    def tell_progress(self, text: str) -> None:
        """The heartbeat is all there is to look at."""

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **render.variables(self.spec)}


def _die_with_parent() -> None:
    """A killed supervisor leaves no ranks that a second one would run beside."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
