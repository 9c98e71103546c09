"""This machine: the supervisor as a process of its own that outlives the terminal.

Enter: one job. Leave: the supervisor's process number. Refused: several nodes, which one machine does not have.
"""

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher import render
from launcher.backends.base import Standing, record_submission
from launcher.spec import JobSpec, JobState
from mmpretrain.core.errors import ClusterError

_FIRST_PORT = 20000


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
        try:
            command = Path(f"/proc/{job}/cmdline").read_bytes()
        except OSError:
            return Standing(JobState.GONE)
        ours = b"launcher.supervise" in command
        return Standing(JobState.RUNNING, nodes=os.uname().nodename) if ours else Standing(JobState.GONE)

    def cancel(self, job: str) -> None:
        if self.poll(job).state is not JobState.GONE:
            os.killpg(int(job), signal.SIGKILL)


def _supervisor(spec: JobSpec) -> list[str]:
    return [spec.python, "-m", "launcher.supervise", str(spec.run)]


BACKEND = LocalBackend()
