"""The run as a person watches it: a live bar in a terminal, a plain line every few steps without one.

Enter: reports, evaluations, events. Leave: text on stdout. The rate counts training time alone; the time left counts
every pause so far.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.base import Outcome, RunFacts, TrackerConfig
from mmpretrain.tracking.figures import duration, objective_losses, significant
from mmpretrain.tracking.report_tables import Table, tables_of

FIGURES_OF_A_LINE = 6
"""An evaluation of more figures is told in tables."""


class ConsoleConfig(TrackerConfig):
    """Progress on stdout; always on."""

    kind: Literal["console"] = "console"

    def build(self, run: RunFacts) -> "ConsoleTracker":
        return ConsoleTracker(run, Console(highlight=False, soft_wrap=True))


class ConsoleTracker:
    """Writes to a rich console; `clock` tells seconds."""

    def __init__(self, run: RunFacts, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self.console = console
        self.pace = Pace(run.total_steps, clock)
        self._bar = _bar(console) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("", total=run.total_steps, figures="")
        self._opening()

    def log(self, report: StepReport) -> None:
        self.pace.count(report)
        if report.skipped:
            self._print(f"step {report.step} skipped: a loss or gradient was not finite", "yellow")
        if self._bar is not None and self._task is not None:
            figures = "\n".join(" | ".join(line) for line in _figures(report, self.pace))
            self._bar.update(self._task, completed=report.step, figures=figures)
        elif self.run.is_due(report.step):
            step = f"step {report.step}/{self.run.total_steps}"
            self._print(" | ".join([step, *(figure for line in _figures(report, self.pace) for figure in line)]))
        if self.run.is_due(report.step):
            self.pace.restart_window()

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        shown = {name: value for name, value in metrics.items() if "chance" not in name}
        heading, few = f"evaluation at step {step}", len(shown) <= FIGURES_OF_A_LINE
        lines = [f"{heading} | {_in_a_row(shown)}"] if few else [heading, *evaluation_lines(metrics)]
        for line in lines:
            self._print(line, "green")

    def note(self, message: str) -> None:
        self._print(message)

    def saved(self, step: int, path: Path) -> None:
        self._print(f"checkpoint {path.name}")

    def alert(self, title: str, text: str) -> None:
        self._print(f"{title}: {text}", "bold yellow")

    def close(self, outcome: Outcome) -> None:
        if self._bar is not None:
            self._bar.stop()
        style = "green" if outcome == "completed" else "yellow"
        step = max(self.pace.step, self.run.start_step)
        self._print(f"{outcome} after step {step}, {duration(self.pace.elapsed)} in this attempt", style)

    def _opening(self) -> None:
        run = self.run
        begun = f"resumes after step {run.start_step}" if run.start_step else "begins"
        self._print(f"{run.name} {begun}: {run.total_steps} steps of {run.global_batch} samples, in {run.run_dir}")
        if self._bar is not None:
            self._bar.start()

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style))


class Pace:
    """Rate over a window of steps, and the time left at the speed of the whole attempt."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self.step = 0
        self._clock = clock
        self._begun = clock()
        self._first: tuple[int, float] | None = None
        self._steps_s = 0.0
        self._samples = 0
        self._last_samples: int | None = None

    def count(self, report: StepReport) -> None:
        """Take a step into account."""
        self.step = report.step
        if self._first is None:
            # The first step warms up (memory, kernels, readers), so the time left is told from the second on.
            self._first = (report.step, self._clock())
        if self._last_samples is not None:
            self._samples += report.samples - self._last_samples
            self._steps_s += report.metrics.get("perf/step_s", 0.0)
        self._last_samples = report.samples

    def restart_window(self) -> None:
        self._steps_s, self._samples = 0.0, 0

    @property
    def elapsed(self) -> float:
        """Seconds since this attempt began."""
        return self._clock() - self._begun

    @property
    def samples_per_s(self) -> float | None:
        """Over the window; None before its second step."""
        return self._samples / self._steps_s if self._steps_s else None

    @property
    def remaining_s(self) -> float | None:
        """None before the second step."""
        if self._first is None or self.step == self._first[0]:
            return None
        step, start = self._first
        return (self._clock() - start) / (self.step - step) * (self.total_steps - self.step)


def _figures(report: StepReport, pace: Pace) -> tuple[list[str], list[str]]:
    """What is learned, then how fast."""
    metrics, rate, remaining = report.metrics, pace.samples_per_s, pace.remaining_s
    learned = [f"loss {significant(metrics['train/loss'])}{_per_objective(metrics)}"]
    if "train/lr" in metrics:
        learned.append(f"lr {significant(metrics['train/lr'])}")
    speed = [] if rate is None else [f"{significant(rate)} samples/s"]
    if "train/mfu" in metrics:
        speed.append(f"mfu {metrics['train/mfu']:.1f}%")
    elif "train/tflops_per_gpu" in metrics:
        speed.append(f"{significant(metrics['train/tflops_per_gpu'])} TFLOP/s a rank")
    if "perf/data_pct" in metrics:
        speed.append(f"data {metrics['perf/data_pct']:.0f}%")
    speed.append(f"eta {'-' if remaining is None else duration(remaining)}")
    return learned, speed


def evaluation_lines(metrics: Mapping[str, float]) -> list[str]:
    """Figures side by side by what they measure, then those of no family."""
    tables = tables_of(metrics)
    placed = {name for table in tables for name in table.names}
    rest = {name: value for name, value in metrics.items() if name not in placed and "chance" not in name}
    lines = [line for table in tables for line in _table_lines(table)]
    return [f"  {line}" for line in [*lines, *([_in_a_row(rest)] if rest else [])]]


def _table_lines(table: Table) -> list[str]:
    """A heading and a row each, in columns."""
    columns = table.columns
    cells = [[table.title, *columns]]
    for label, values in table.rows.items():
        cells.append([label, *("" if column not in values else significant(values[column]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_placed(row, widths)).rstrip() for row in cells]


def _placed(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The label to the left, figures to the right."""
    for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if number else cell.ljust(width)


def _in_a_row(figures: Mapping[str, float]) -> str:
    return " | ".join(f"{name.removeprefix('val/')} {significant(value)}" for name, value in figures.items())


def _per_objective(metrics: Mapping[str, float]) -> str:
    losses = [f"{name} {significant(value)}" for name, value in objective_losses(metrics).items()]
    return f" ({' '.join(losses)})" if len(losses) > 1 else ""


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
