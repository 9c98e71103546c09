"""Facts, reports and rows of a small run, for tests of what watches runs."""

from pathlib import Path

from mmpretrain.core.types import StepReport
from mmpretrain.tracking.base import RunFacts
from mmpretrain.tracking.jsonl import JsonlTracker


def facts(run_dir: Path, attempt: int = 0, start_step: int = 0, log_every: int = 10) -> RunFacts:
    return RunFacts(
        run_dir=run_dir,
        name="tiny",
        experiment="trials",
        attempt=attempt,
        total_steps=30,
        start_step=start_step,
        global_batch=4,
        config={"seed": 7},
        log_every=log_every,
    )


def report(step: int, loss: float = 1.0, skipped: bool = False, **metrics: float) -> StepReport:
    return StepReport(step, 4 * step, {"train/loss": loss, **metrics}, skipped=skipped)


def write(run_dir: Path, attempt: int, steps: range, loss: float) -> None:
    tracker = JsonlTracker(run_dir / "metrics.jsonl", attempt)
    for step in steps:
        tracker.log(report(step, loss))
    tracker.close("crashed")
