"""`mmpretrain cancel RUN`: end a run, kindly where it runs, at once where it waits.

Enter: a run folder. Leave: a sentence. Refused: a run that no job runs.
"""

from pathlib import Path

from launcher.backends.base import backend_named, read_submission, standing
from launcher.spec import JobState
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError


def cancel_run(run: Path, now: bool) -> str:
    """What was done."""
    submitted, where = read_submission(run), standing(run)
    if submitted is None:
        raise ClusterError(f"{run} was not submitted; a run of torchrun stops after: touch {run}/control/stop")
    if where.state is JobState.GONE:
        raise ClusterError(f"{run} has no job any more; `mmpretrain why {run}` tells how it ended")
    if now or where.state is JobState.QUEUED:
        backend_named(submitted.backend).cancel(submitted.job, run)
        return f"cancelled job {submitted.job} of {run}"
    run_files.ask(run, "stop", "cancelled by its owner")
    return f"{run} stops after the step in hand and a checkpoint; with --now it would end at once"
