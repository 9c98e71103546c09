"""A run that is watched closely while it is broken: its history, its newest step, and waiting for either to change.

Enter: the folder of a submitted run. Leave: facts, as its files tell them. Refused: what does not happen before a
deadline, with the last words of the job's log.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.base import read_submission, standing
from launcher.history import Attempt, History
from launcher.spec import JobState
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError

DEADLINE_S = 600.0
_POLL_S = 0.2
_LOG_CHARACTERS = 4000

Row = dict[str, object]


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Look until `condition` holds; past the deadline ClusterError names what did not happen."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > deadline_s:
            raise ClusterError(f"{what} did not happen within {deadline_s:g} s")
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class Subject:
    """One run."""

    run: Path
    deadline_s: float = DEADLINE_S
    """For whatever is waited for."""

    @property
    def job(self) -> str:
        """The number of its newest job."""
        submitted = read_submission(self.run)
        assert submitted is not None, f"{self.run} was not submitted"
        return submitted.job

    @property
    def history(self) -> list[Attempt]:
        """Attempts that have ended."""
        return History(self.run).read()

    @property
    def current(self) -> Attempt | None:
        """The attempt that goes on."""
        return History(self.run).current()

    @property
    def step(self) -> int:
        """The newest step of this attempt; 0 while it starts."""
        beat, current = run_files.read_heartbeat(self.run), self.current
        fresh = beat is not None and current is not None and beat.time > current.began and beat.phase != "start"
        return run_files.last_step(self.run) if fresh else 0

    @property
    def log(self) -> str:
        """What the job printed."""
        path = self.run / "logs" / "job.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    @property
    def is_gone(self) -> bool:
        """Whether no job runs it, or waits to."""
        return standing(self.run).state is JobState.GONE

    def wait_for_step(self, step: int, attempt: int = 0) -> None:
        """Until an attempt of this number, or a later one, has come so far."""

        def reached() -> bool:
            current = self.current
            if current is None and self.is_gone and self.current is None:
                raise ClusterError(f"the job of {self.run} ended before step {step}")
            return current is not None and current.attempt >= attempt and self.step >= step

        self.wait(reached, f"step {step} of attempt {attempt}")

    def wait_for_end(self) -> None:
        """Until its job is gone."""
        self.wait(lambda: self.is_gone, f"the end of the job of {self.run}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until a condition holds."""
        try:
            wait_until(condition, what, self.deadline_s)
        except ClusterError as fault:
            raise ClusterError(f"{fault}; its log ends with\n{self.log[-_LOG_CHARACTERS:]}") from None

    def rows(self, name: str) -> list[Row]:
        """Rows of one of its .jsonl files; the last one, which may be half written, only if it is whole."""
        path = self.run / name
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self) -> list[Row]:
        """Its training steps, in the order in which they were done."""
        return [row for row in self.rows(run_files.METRICS) if "train/loss" in row]

    def losses(self) -> dict[object, object]:
        """Step -> loss of the newest attempt that reached it."""
        return {row["step"]: row["train/loss"] for row in self.steps()}
