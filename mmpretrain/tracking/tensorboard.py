"""Points for TensorBoard, in the run folder's `tensorboard/`.

Enter: reports and evaluations. Leave: event files; points that an earlier attempt wrote past the step at which this one
resumes are marked as undone. Refuses, saying what to install, where tensorboard is absent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.base import Outcome, RunFacts, TrackerConfig
from mmpretrain.tracking.pictures import decoded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardConfig(TrackerConfig):
    """TensorBoard event files; needs the `tensorboard` extra."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, run: RunFacts) -> "TensorBoardTracker":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as fault:
            raise ConfigError(
                "tracking.trackers names tensorboard, which is not installed; run "
                "`pip install 'mmpretrain[tensorboard]'` or remove it from the list"
            ) from fault
        purge_step = run.start_step + 1 if run.attempt else None
        return TensorBoardTracker(run, SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge_step))


class TensorBoardTracker:
    """Writes every due step: a point costs too much to write them all (2 ms for 41 figures)."""

    def __init__(self, run: RunFacts, writer: "SummaryWriter") -> None:
        self.run = run
        self._writer = writer

    def log(self, report: StepReport) -> None:
        if self.run.is_due(report.step) or report.skipped:
            self._scalars(report.step, report.metrics)

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        self._scalars(step, metrics)
        for name, shown in (pictures or {}).items():
            for number, picture in enumerate(shown):
                self._writer.add_image(f"{name}/{number}", np.asarray(decoded(picture.path)), step, dataformats="HWC")
        self._writer.flush()

    def note(self, message: str) -> None:
        """Events are for the console."""

    def saved(self, step: int, path: Path) -> None:
        """Checkpoints are for the console."""

    def alert(self, title: str, text: str) -> None:
        """Events are for the console."""

    def close(self, outcome: Outcome) -> None:
        self._writer.close()

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
