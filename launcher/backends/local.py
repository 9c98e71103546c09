"""This machine: the supervisor as a process of its own that outlives the terminal.

Enter: one job. Leave: the supervisor's process number. Refused: several nodes, which one machine does not have.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence

import psutil

from launcher import render
from launcher.backends.base import Standing, record_submission
from launcher.spec import JobSpec, JobState
from mmpretrain.core.errors import ClusterError

_FIRST_PORT = 20000
_EXEC_S = 1.0
"""The longest that replacing a program takes."""


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
        script = " ; ".join(shlex.join(_supervisor(spec)) for spec in specs)
        environment = {**os.environ, **render.variables(specs[0])}
        log = specs[0].run / "logs" / "job.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["bash", "-c", f"exec {script}" if len(specs) == 1 else script]
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for spec in specs:
            record_submission(spec.run, self.name, str(process.pid))
        return str(process.pid)

    def poll(self, job: str) -> Standing:
        ours = any("launcher.supervise" in word for word in _command(int(job)))
        return Standing(JobState.RUNNING, nodes=os.uname().nodename) if ours else Standing(JobState.GONE)

    def cancel(self, job: str) -> None:
        if self.poll(job).state is not JobState.GONE:
            os.killpg(int(job), signal.SIGKILL)


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
