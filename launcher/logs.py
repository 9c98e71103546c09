"""`mmpretrain logs RUN`: the job's output, or one rank's own log, to its end and onwards.

Enter: a run folder. Leave: text as it is written. Refused: a log that is not there.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from launcher.backends.base import standing
from launcher.spec import JobState
from mmpretrain.core.errors import ClusterError

_POLL_S = 0.5


def log_file(run: Path, rank: int | None) -> Path:
    """The job's output, or a rank's log; a run that no launcher started has the latter alone."""
    job = run / "logs" / "job.log"
    path = run / "logs" / f"rank-{rank or 0}.log" if rank is not None or not job.is_file() else job
    if not path.is_file():
        there = sorted(one.name for one in (run / "logs").glob("*.log")) if (run / "logs").is_dir() else []
        raise ClusterError(f"there is no {path}; logs there: {', '.join(there) or 'none yet'}")
    return path


def last_lines(path: Path, count: int) -> list[str]:
    with path.open(errors="replace") as file:
        return file.read().splitlines()[-count:]


def follow(run: Path, path: Path) -> Iterator[str]:
    """What is appended from now on, until the job is gone."""
    with path.open(errors="replace") as file:
        file.seek(0, 2)
        while True:
            text = file.read()
            if text:
                yield text
            elif standing(run).state is JobState.GONE:
                yield file.read()
                return
            else:
                time.sleep(_POLL_S)
