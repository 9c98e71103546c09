"""This machine: the supervisor as a process of its own that outlives the terminal.

Enter: one job. Leave: the supervisor's process number. Refused: several nodes, which one machine does not have.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from launcher import render
from launcher.backends.base import Standing, record_submission
from launcher.spec import JobSpec, JobState
from mmpretrain.core.errors import ClusterError

_FIRST_PORT = 20000
_EXEC_S = 1.0
"""The longest that replacing a program takes."""
_WAIT = 'for job in $0; do while [ -e "/proc/$job/exe" ]; do sleep 0.5; done; done; exec "$@"'
"""A shell that becomes a supervisor once other processes are gone; one that nobody has waited for has no program."""


class LocalBackend:
    """One supervisor process for each run; the runs of a sweep go one after the other."""

    name = "local"

    def check(self, spec: JobSpec) -> None:
        if spec.nodes != 1:
            raise ClusterError(f"--to local has one node, saw --nodes {spec.nodes}; leave it out, or use --to slurm")

    def render(self, specs: Sequence[JobSpec]) -> str:
        lines = ["# environment"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(render.variables(specs[0]).items())]
        for spec in specs:
            lines += ["# the supervisor", shlex.join(_supervisor(spec)), "# and what it starts for each attempt"]
            lines.append(shlex.join(render.local_step(spec, _FIRST_PORT, 0)))
        return "\n".join(lines) + "\n"

    def submit(self, specs: Sequence[JobSpec]) -> str:
        """Start them; the number is the first one's, since each run of a sweep is a process of its own that waits."""
        started: list[str] = []
        for spec in specs:
            started.append(str(_start(spec, started)))
            record_submission(spec.run, self.name, started[-1])
        return started[0]

    def poll(self, job: str, run: Path) -> Standing:
        command = _command(int(job))
        if not _supervises(command, run):
            return Standing(JobState.GONE)
        if _WAIT in command:
            return Standing(JobState.QUEUED, "runs of its sweep before it")
        return Standing(JobState.RUNNING, nodes=os.uname().nodename)

    def cancel(self, job: str, run: Path) -> None:
        if self.poll(job, run).state is not JobState.GONE:
            os.killpg(int(job), signal.SIGKILL)


def _start(spec: JobSpec, earlier: Sequence[str]) -> int:
    """Its supervisor, or a shell that becomes it once the earlier processes are gone."""
    wait = ["bash", "-c", _WAIT, " ".join(earlier)] if earlier else []
    log = spec.run / "logs" / "job.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            [*wait, *_supervisor(spec)],
            env={**os.environ, **render.variables(spec)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process.pid


def _supervises(command: Sequence[str], run: Path) -> bool:
    """Whether a process is the supervisor of this very run, or waits to be."""
    if "launcher.supervise" not in command:
        return False
    folder = command[command.index("launcher.supervise") + 1 :][:1]
    return [Path(one).resolve() for one in folder] == [run.resolve()]


def _command(pid: int) -> list[str]:
    """Of a process, empty where there is none. One that is just replacing its program has none for a moment."""
    end = time.monotonic() + _EXEC_S
    command: list[str] = []
    try:
        process = psutil.Process(pid)
        while not (command := process.cmdline()) and time.monotonic() < end:
            time.sleep(0.005)
    except psutil.NoSuchProcess:  # zombies too
        return []
    return command


def _supervisor(spec: JobSpec) -> list[str]:
    return [spec.python, "-m", "launcher.supervise", str(spec.run), "--local"]


BACKEND = LocalBackend()
