"""What happens after each step besides the step: each hook reads an immutable report and may ask for more.

Enter: a StepReport, the same on every rank. Leave: SAVE, EVALUATE, STOP or nothing, equal on every rank.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from enum import Flag, auto
from pathlib import Path
from typing import Protocol

import torch.profiler

from mmpretrain.core.errors import DivergenceError
from mmpretrain.core.types import StepReport
from mmpretrain.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class Verdict(Flag):
    """What a hook asks of the loop."""

    NOTHING = 0
    SAVE = auto()
    EVALUATE = auto()
    STOP = auto()


class Hook(Protocol):
    """Called on every rank after every step."""

    def __call__(self, report: StepReport) -> Verdict: ...


class Requested:
    """Signals and control files."""

    def __call__(self, report: StepReport) -> Verdict:
        if report.stacks_requested:
            os.kill(os.getpid(), signal.SIGUSR2)
        if report.stop_requested:
            return Verdict.SAVE | Verdict.STOP
        asked = Verdict.SAVE if report.save_requested else Verdict.NOTHING
        return asked | (Verdict.EVALUATE if report.evaluate_requested else Verdict.NOTHING)


class Every:
    """One verdict each `every` steps and after the last; with `every` 0 after the last alone."""

    def __init__(self, every: int, last_step: int, verdict: Verdict) -> None:
        self.every, self.last_step, self.verdict = every, last_step, verdict

    def __call__(self, report: StepReport) -> Verdict:
        due = report.step == self.last_step or (self.every > 0 and report.step % self.every == 0)
        return self.verdict if due else Verdict.NOTHING


class StopOnDivergence:
    """Names the samples of every skipped step; stops the run after `budget` of them in a row."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.in_a_row = 0

    def __call__(self, report: StepReport) -> Verdict:
        self.in_a_row = self.in_a_row + 1 if report.skipped else 0
        if report.skipped:
            log.warning(
                "step %d skipped on all ranks: loss or gradient is not finite; samples: %s",
                report.step,
                ", ".join(report.keys),
            )
        if self.in_a_row > self.budget:
            raise DivergenceError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (budget: "
                f"max_skipped_steps={self.budget}); lower optimizer.lr, or resume from a checkpoint before step "
                f"{report.step - self.in_a_row + 1}"
            )
        return Verdict.NOTHING


class WarnBelow:
    """Warns once for each figure that falls below a floor. Main rank only."""

    def __init__(self, prefix: str, floor: float, meaning: str) -> None:
        """`prefix`: figures whose names begin so; `meaning`: what it means and what to do."""
        self.prefix, self.floor, self.meaning = prefix, floor, meaning
        self.warned: set[str] = set()

    def __call__(self, report: StepReport) -> Verdict:
        for name, value in report.metrics.items():
            if name.startswith(self.prefix) and value < self.floor and name not in self.warned:
                self.warned.add(name)
                log.warning("step %d: %s is %.3g, below %g: %s", report.step, name, value, self.floor, self.meaning)
        return Verdict.NOTHING


class WriteSkippedSteps:
    """`skipped.jsonl`: step and sample keys of every skipped step. Main rank only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, report: StepReport) -> Verdict:
        if report.skipped:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": report.step, "keys": list(report.keys)}) + "\n")
        return Verdict.NOTHING


class RecordConsumed:
    """`consumed.jsonl`: what the samples of every step add up to, from which `data ledger` proves that none was lost.
    Main rank only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, report: StepReport) -> Verdict:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": report.step, "digest": f"{report.digest:016x}"}) + "\n")
        return Verdict.NOTHING


class TraceSamples:
    """`samples.jsonl`: the sample keys of every step in global order. Main rank only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, report: StepReport) -> Verdict:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": report.step, "keys": list(report.keys)}) + "\n")
        return Verdict.NOTHING


class Heartbeat:
    """`heartbeat.json`, at most once a second. Main rank only."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.written = 0.0

    def __call__(self, report: StepReport) -> Verdict:
        if time.monotonic() - self.written >= 1.0:
            self.folder.beat(report)
            self.written = time.monotonic()
        return Verdict.NOTHING


class Profile:
    """control/profile:N: `profiles/step-XXXXXXXX.json`, a Chrome trace of the next N steps. Main rank only."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps_left = 0
        self.profiler: torch.profiler.profile | None = None

    def __call__(self, report: StepReport) -> Verdict:
        if self.profiler is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                self._finish(self.profiler, report.step)
        elif steps := self.folder.take_numbered_control("profile"):
            self.steps_left = steps
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()
        return Verdict.NOTHING

    def _finish(self, profiler: torch.profiler.profile, step: int) -> None:
        profiler.stop()
        self.profiler = None
        path = self.folder.path / "profiles" / f"step-{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.info("wrote the profile %s", path)


class Do:
    """Run an action after every step (trackers, the ledger)."""

    def __init__(self, action: Callable[[StepReport], None]) -> None:
        self.action = action

    def __call__(self, report: StepReport) -> Verdict:
        self.action(report)
        return Verdict.NOTHING
