"""Loss spikes: how far a step's loss and gradient norm stand above those of the steps before.

Enter: the metrics of each step, the same on every rank. Leave: a score in standard deviations, and, where the config
asks for it, `RollBack`: the run goes back to its newest checkpoint and passes over the data that led to the spike
(PaLM, arXiv 2204.02311, section 5.1). Refuses to go back more often than the config allows.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mmpretrain.config import SpikeConfig
from mmpretrain.core.errors import DataError, DivergenceError
from mmpretrain.core.run_files import record_of, whole_rows
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.jsonl import METRICS_FILE
from mmpretrain.tracking.record import read_metrics
from mmpretrain.training.hooks import Verdict
from mmpretrain.training.manifest import PassedOver

log = logging.getLogger(__name__)

SCORE = "train/spike_score"
WATCHED = ("train/loss", "train/grad_norm")
FEWEST = 32
"""Steps that must have been seen before a score means anything."""
ROLLBACKS = "rollbacks.jsonl"


class RollBack(Exception):
    """The run is to go on from its newest checkpoint; every rank raises it after the same step."""

    def __init__(self, step: int, score: float) -> None:
        super().__init__(f"step {step} stands {score:.1f} sigma above the steps before it")
        self.step, self.score = step, score


class SpikeMeter:
    """Scores each step against a window of those before it."""

    def __init__(self, window: int = SpikeConfig().window) -> None:
        self._past: dict[str, deque[float]] = {name: deque(maxlen=window) for name in WATCHED}

    def score(self, metrics: Mapping[str, float]) -> float:
        """The larger of both figures' distances above the window's mean, in its standard deviations; then remember
        the step. 0 while there is too little to compare with, or where a figure is not finite."""
        found = [_distance(metrics[name], self._past[name]) for name in WATCHED]
        self.remember(metrics)
        return max(found)

    def remember(self, metrics: Mapping[str, float]) -> None:
        """Add a step to the window; figures that are not finite are left out."""
        for name in WATCHED:
            if math.isfinite(metrics.get(name, math.nan)):
                self._past[name].append(metrics[name])


def _distance(value: float, past: deque[float]) -> float:
    if len(past) < FEWEST or not math.isfinite(value):
        return 0.0
    mean = math.fsum(past) / len(past)
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in past) / len(past))
    return max(0.0, (value - mean) / max(spread, 1e-12 * max(1.0, abs(mean))))


def read_rollbacks(run: Path) -> tuple[PassedOver, ...]:
    """What the run passed over so far, in order."""
    try:
        return tuple(record_of(PassedOver, row) for row in whole_rows(run / ROLLBACKS))
    except ValueError as error:
        raise DataError(f"{run / ROLLBACKS} holds a row that is no return to a checkpoint ({error})") from error


def restore_rollbacks(run: Path, passed_over: Sequence[PassedOver]) -> None:
    """What a checkpoint knows, in a folder that does not: the run goes on elsewhere than where it was begun."""
    if not (run / ROLLBACKS).is_file():
        for passed in passed_over:
            write_rollback(run, passed)


def write_rollback(run: Path, passed: PassedOver) -> None:
    with (run / ROLLBACKS).open("a") as file:
        file.write(json.dumps(asdict(passed)) + "\n")


def meter_at(run: Path, step: int, window: int) -> SpikeMeter:
    """A meter that remembers the steps up to this one that stand in metrics.jsonl, so that a resumed run scores as one
    that never stopped."""
    meter = SpikeMeter(window)
    rows = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    for row in [row for row in rows if row.is_training and row.step <= step][-window:]:
        meter.remember(row.metrics)
    return meter


class WatchForSpikes:
    """Alerts at a spike; goes back where the config says so. On every rank, before anything is saved."""

    def __init__(self, config: SpikeConfig, done: int, alert: Callable[[str, str], None]) -> None:
        self.config, self.done, self.alert = config, done, alert

    def __call__(self, report: StepReport) -> Verdict:
        score = report.metrics[SCORE]
        if score <= self.config.sigmas:
            return Verdict.NOTHING
        figures = ", ".join(f"{name} {report.metrics[name]:.4g}" for name in WATCHED)
        self.alert("loss spike", f"step {report.step} stands {score:.1f} sigma above the steps before it: {figures}")
        if self.config.action == "alert":
            return Verdict.NOTHING
        if self.done >= self.config.max_rollbacks:
            raise DivergenceError(
                f"step {report.step} spikes ({figures}) and the run went back {self.done} times already "
                f"(spikes.max_rollbacks={self.config.max_rollbacks}); lower optimizer.lr or raise schedule.warmup"
            )
        raise RollBack(report.step, score)
