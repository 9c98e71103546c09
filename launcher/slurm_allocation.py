"""The nodes of a Slurm job, as the supervisor sees them from inside its batch script.

Enter: SLURM_* variables. Leave: job steps by srun, and the job queued again by scontrol. A controller that is slow or
restarts must not end a run: what the run cannot do without is asked again, all else counts as not known.
"""

import logging
import os
import re
import signal
import subprocess
from collections.abc import Sequence

from launcher import render, slurm_commands
from launcher.allocation import ENDED, PREEMPTION, TIME_LIMIT, TOOL_TIMEOUT_S
from launcher.backends.slurm import submit_again
from launcher.slurm_commands import NoAnswer, patiently
from launcher.spec import JobSpec
from mmpretrain.core.errors import ClusterError

log = logging.getLogger(__name__)

_EARLY_S = 120
"""Slurm may signal a job a minute before it was asked to."""
_PATIENCE_S = 300.0
"""For answers without which the run ends."""
_LOOK_S = 30.0
"""For the state of the job, while its last minutes run."""


class SlurmAllocation:
    """One job with a step for each attempt."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self._job = _job_number()
        nodes = os.environ["SLURM_JOB_NODELIST"]
        self._nodes = tuple(patiently(lambda: slurm_commands.hostnames(nodes), _PATIENCE_S))
        self._address = patiently(lambda: slurm_commands.address_of(self._nodes[0]), _PATIENCE_S)

    @property
    def job(self) -> str:
        return self._job

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._nodes

    @property
    def requeues(self) -> bool:
        return True

    def start(self, attempt: int, port: int) -> subprocess.Popen[bytes]:
        command = render.slurm_step(self.spec, self._address, port, attempt)
        return subprocess.Popen(command, env=self._environment(), start_new_session=True)

    def on_every_node(self, name: str, arguments: Sequence[str]) -> None:
        command = render.slurm_tool(self.spec, name, arguments)
        try:
            subprocess.run(command, env=self._environment(), timeout=TOOL_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %g s on every node", name, TOOL_TIMEOUT_S)

    def kill(self, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """The step first, since srun may be killed while its ranks live on."""
        for step in self._steps(f"train-{attempt}"):
            _try("scancel", "--signal=KILL", step)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _steps(self, name: str) -> list[str]:
        text = _try("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j")
        return [step for step, _, found in (line.partition(" ") for line in text.splitlines()) if found.strip() == name]

    def silent_nodes(self) -> list[str]:
        try:
            return slurm_commands.silent_nodes(self._nodes)
        except ClusterError:
            return []

    def stop_reason(self, number: int) -> str:
        if number == signal.SIGTERM:
            return ENDED
        try:
            job = slurm_commands.queued_job(self._job)
        except ClusterError:
            job = None
        left = None if job is None else job.time_left_s
        near = left is not None and left <= self.spec.cluster.signal_lead_s + _EARLY_S
        return TIME_LIMIT if near else PREEMPTION

    def requeue(self) -> bool:
        """Only a job that is not being ended already: one that was cancelled stays so."""
        if not self._goes_on():
            return False
        try:
            patiently(lambda: slurm_commands.call("scontrol", "requeue", self._job), _PATIENCE_S)
        except NoAnswer:
            raise
        except ClusterError as fault:
            if self._goes_on():  # otherwise it was queued by a try that was heard and not answered
                log.warning("%s; submitting a job that follows this one instead", fault)
                submit_again(self.spec, after=self._job)
        return True

    def _goes_on(self) -> bool:
        """Whether the job runs and nobody has ended or requeued it, as far as Slurm says anything of it."""
        try:
            job = patiently(lambda: slurm_commands.queued_job(self._job), _LOOK_S)
        except ClusterError as fault:
            log.warning("%s; taking the job for one that runs", fault)
            return True
        return job is not None and job.state == "RUNNING"

    def replace_nodes(self, bad: Sequence[str]) -> bool:
        submit_again(self.spec, after=self._job, exclude=bad)
        return True

    def _environment(self) -> dict[str, str]:
        """Without what sbatch chose for this script, since each step says itself what it wants; with the run's own."""
        left_out = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_NODE")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        return kept | render.variables(self.spec)

    def tell_progress(self, text: str) -> None:
        _try("scontrol", "update", f"JobId={self._job}", f"Comment={re.sub(r'[^ -~]', ' ', text)}")


def _job_number() -> str:
    """Of this job alone: an array's last task has the number of the whole array as its own."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ["SLURM_JOB_ID"] if array is None or task is None else f"{array}_{task}"


def _try(*command: str) -> str:
    try:
        return slurm_commands.call(*command)
    except ClusterError as fault:
        log.debug("%s", fault)
        return ""
