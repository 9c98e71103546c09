"""`mmpretrain submit --again RUN`: queue a run as it was submitted; it continues from its newest checkpoint.

Enter: a run folder that was submitted. Leave: the number of the new job. Refused: a run that a job runs already.
"""

from pathlib import Path

from launcher.backends.base import backend_named, read_submission, refuse_second_job
from launcher.spec import read_spec


def submit_again(run: Path) -> str:
    """The same code, config and resources."""
    spec = read_spec(run)
    refuse_second_job(run)
    submitted = read_submission(run)
    backend = backend_named("local" if submitted is None else submitted.backend)
    backend.check(spec)
    return backend.submit([spec])
