"""A Slurm cluster: the rendered batch script through sbatch, one job for a run or one array for a sweep.

Enter: jobs whose folders stand. Leave: the job's number. Refused: a machine without Slurm, and with Slurm's own reason
whatever `sbatch --test-only` says could never run.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launcher import bad_nodes, render, slurm_commands
from launcher.backends.base import Standing, record_submission
from launcher.spec import JobSpec, JobState
from mmpretrain.core.run_files import replace

_STATES = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD"), JobState.QUEUED),
    **dict.fromkeys(("RUNNING", "RESIZING", "SIGNALING"), JobState.RUNNING),
    **dict.fromkeys(("COMPLETING", "STAGE_OUT"), JobState.ENDING),
}
"""Every state of a job that is not gone."""


class SlurmBackend:
    """sbatch, squeue, scancel."""

    name = "slurm"

    def check(self, spec: JobSpec) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(render.sbatch_script(spec, bad_nodes.known(spec.run.parent)))
            file.flush()
            slurm_commands.call("sbatch", "--test-only", file.name)

    def render(self, specs: Sequence[JobSpec]) -> str:
        exclude = bad_nodes.known(specs[0].run.parent)
        if len(specs) == 1:
            return render.sbatch_script(specs[0], exclude)
        return render.array_script(specs, _list_file(specs), exclude)

    def submit(self, specs: Sequence[JobSpec]) -> str:
        script = specs[0].launch_folder / "job.sbatch"
        replace(script, self.render(specs))
        if len(specs) > 1:
            replace(_list_file(specs), "".join(f"{spec.run}\n" for spec in specs))
        for spec in specs:
            (spec.run / "logs").mkdir(exist_ok=True)
        job = _sbatch(script)
        for number, spec in enumerate(specs):
            record_submission(spec.run, self.name, job if len(specs) == 1 else f"{job}_{number}")
        return job

    def poll(self, job: str, run: Path) -> Standing:
        found = slurm_commands.queued_job(job)
        if found is None:
            return Standing(JobState.GONE)
        state = _STATES.get(found.state, JobState.GONE)
        return Standing(state, found.reason if state is JobState.QUEUED else "", found.nodes)

    def cancel(self, job: str, run: Path) -> None:
        slurm_commands.call("scancel", job)


def submit_again(spec: JobSpec, after: str, exclude: Sequence[str] = ()) -> str:
    """The same run as a job that begins when another has ended, on other nodes than some."""
    script = spec.launch_folder / "job-again.sbatch"
    replace(script, render.sbatch_script(spec, [*bad_nodes.known(spec.run.parent), *exclude]))
    job = _sbatch(script, f"--dependency=afterany:{after}")
    record_submission(spec.run, BACKEND.name, job)
    return job


def submit_tasks(spec: JobSpec, tasks: int, joined: bool) -> str:
    """An array of tasks that divide one piece of work; `joined`: then the work as a whole, which finds it done."""
    text = render.tasks_script(spec, tasks)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(text)
        file.flush()
        slurm_commands.call("sbatch", "--test-only", file.name)
    for folder in (spec.launch_folder, spec.run / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    replace(spec.launch_folder / "tasks.sbatch", text)
    job = _sbatch(spec.launch_folder / "tasks.sbatch")
    if joined:
        replace(spec.launch_folder / "join.sbatch", render.join_script(spec))
        _sbatch(spec.launch_folder / "join.sbatch", f"--dependency=afterok:{job}")
    return job


def _sbatch(script: Path, *options: str) -> str:
    text = slurm_commands.call("sbatch", "--parsable", *options, str(script))
    return re.split(r"[;\s]", text.strip())[0]


def _list_file(specs: Sequence[JobSpec]) -> Path:
    return specs[0].launch_folder / "runs.txt"


BACKEND = SlurmBackend()
