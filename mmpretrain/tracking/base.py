"""What every tracker is: a config with `build(run)`, and six calls that the main rank makes.

Enter: the facts of a run and its step reports. Leave: rows, lines, points, wherever a tracker puts them.
Only rank 0 builds trackers, so nothing here may communicate.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from mmpretrain.core.config import Config
from mmpretrain.core.types import Pictures, StepReport

Outcome = Literal["completed", "preempted", "fatal", "crashed"]


@dataclass(frozen=True)
class RunFacts:
    """What a tracker may know of the run it follows."""

    run_dir: Path
    name: str
    """The run's own name, unique enough to tell it from its siblings."""
    experiment: str
    """What runs are grouped by."""
    attempt: int
    """Number of this start of the run, from 0."""
    total_steps: int
    start_step: int
    """Steps already done when this attempt begins."""
    global_batch: int
    config: Mapping[str, object]
    """The resolved config as plain values."""
    log_every: int = 10
    """Steps between two lines or points of the trackers that thin out."""

    def is_due(self, step: int) -> bool:
        """Whether a tracker that thins out shows this step: the first of the attempt, every n-th and the last."""
        return step % self.log_every == 0 or step in (self.start_step + 1, self.total_steps)


class Tracker(Protocol):
    """Follows a run. May raise: `Trackers` contains the failures of those that are not required."""

    def log(self, report: StepReport) -> None:
        """One finished step."""

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        """Figures of an evaluation after `step` steps, and what it leaves to look at."""

    def note(self, message: str) -> None:
        """An event in one line: a checkpoint, a preemption."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint was written."""

    def alert(self, title: str, text: str) -> None:
        """What a person should know now: a loss spike, a slow rank."""

    def close(self, outcome: Outcome) -> None:
        """The attempt is over; nothing follows."""


class TrackerConfig(Config):
    """Config of a tracker; subclasses add `kind: Literal[...]`."""

    required: ClassVar[bool] = False
    """Whether a failure of this tracker ends the run; others are dropped with one warning."""

    @abstractmethod
    def build(self, run: RunFacts) -> Tracker:
        """A tracker at work. Refuses with ConfigError what a person must repair first."""
