"""What every backend is: submit, poll and cancel, and the text of what it would run.

Enter: a JobSpec. Leave: the job's number, and where it is. A backend is one file here, registered by being there.
"""

import importlib
import json
import pkgutil
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from launcher.spec import LAUNCH, JobSpec, JobState
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.core.json_text import parse_json

_JOB = re.compile(r"\d{1,18}(_\d{1,18})?", re.ASCII)


@dataclass(frozen=True)
class Submitted:
    """The newest job of a run folder."""

    backend: str
    job: str
    time: float


@dataclass(frozen=True)
class Standing:
    """Where a job is."""

    state: JobState
    reason: str = ""
    """Why it waits, as the scheduler says."""
    nodes: str = ""


class Backend(Protocol):
    """One way to get a job run."""

    name: str

    def check(self, spec: JobSpec) -> None:
        """Refuse what could never run, before anything is written."""
        ...

    def render(self, specs: Sequence[JobSpec]) -> str:
        """What `submit` would run, exactly."""
        ...

    def submit(self, specs: Sequence[JobSpec]) -> str:
        """Start or queue one run, or an array of them; their folders stand. Returns the job's number."""
        ...

    def poll(self, job: str, run: Path) -> Standing:
        """Where the job of a run is."""
        ...

    def cancel(self, job: str, run: Path) -> None:
        """End the job of a run that does not end by itself, and that of no other."""
        ...


def backends() -> dict[str, Backend]:
    """Name -> backend, of every module of this package that has one."""
    found: dict[str, Backend] = {}
    package = importlib.import_module("launcher.backends")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name != "base":
            backend = importlib.import_module(f"launcher.backends.{info.name}").BACKEND
            found[backend.name] = backend
    return found


def backend_named(name: str) -> Backend:
    known = backends()
    if name not in known:
        raise ConfigError(f"--to is {name!r}; choose one of {', '.join(known)}")
    return known[name]


def record_submission(run: Path, backend: str, job: str) -> None:
    content = json.dumps(asdict(Submitted(backend, job, time.time())))
    run_files.replace(run / LAUNCH / "submitted.json", content + "\n")


def read_submission(run: Path) -> Submitted | None:
    path = run / LAUNCH / "submitted.json"
    if not path.is_file():
        return None
    try:
        submitted = run_files.record_of(Submitted, parse_json(path.read_text(errors="replace")))
    except ValueError as error:
        raise ClusterError(f"{path} is not what a launcher wrote ({error}); remove it if no job runs") from error
    if not _JOB.fullmatch(submitted.job):  # it becomes an argument of the scheduler's commands
        raise ClusterError(f"{path} names the job {submitted.job[:40]!r}, which is no number; remove it if no job runs")
    return submitted


def standing(run: Path) -> Standing:
    """Where the newest job of a run folder is."""
    submitted = read_submission(run)
    if submitted is None:
        return Standing(JobState.GONE)
    try:
        return backend_named(submitted.backend).poll(submitted.job, run)
    except ClusterError as fault:
        return Standing(JobState.GONE, str(fault))


def refuse_second_job(run: Path) -> None:
    """Two jobs that write one run folder would destroy it."""
    submitted, where = read_submission(run), standing(run)
    if submitted is not None and where.state is not JobState.GONE:
        raise ClusterError(
            f"{run} is {where.state} already as job {submitted.job}; watch it with `mmpretrain status {run}`, or end "
            f"it with `mmpretrain cancel {run}` first"
        )
