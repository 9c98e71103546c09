"""metrics.jsonl read back: every whole row, and of rows that several attempts wrote, those that stand.

Enter: a run folder. Leave: typed rows in the order of steps, and the number of lines that are no row: a killed run
left them torn, or somebody else wrote them. Refuses a folder without metrics.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import LATEST_TIME, fits
from mmpretrain.tracking.jsonl import METRICS_FILE

MAX_NAME = 200
"""Characters of a metric's name."""

_NOT_METRICS = frozenset({"step", "samples", "attempt", "time", "skipped", "nonfinite"})


@dataclass(frozen=True)
class Row:
    """One line: a training step or an evaluation."""

    step: int
    samples: int
    attempt: int
    time: float
    """Seconds since 1970."""
    metrics: Mapping[str, float]
    """By name; NaN where the figure was not finite."""
    skipped: bool = False

    @property
    def is_training(self) -> bool:
        """Whether this is a step; other rows are evaluations."""
        return "train/loss" in self.metrics


@dataclass(frozen=True)
class MetricsRecord:
    """All whole rows in the order in which they were written."""

    rows: tuple[Row, ...]
    torn: int
    """Lines that are no row: the last words of killed attempts."""


def read_record(run_dir: Path) -> MetricsRecord:
    """Every row of every attempt."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir} has no {METRICS_FILE}; name the folder of a run that has finished a step")
    rows: list[Row] = []
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            row = _parse(line)
            if row is None:
                torn += 1
            else:
                rows.append(row)
    return MetricsRecord(tuple(rows), torn)


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows that stand, in the order of steps."""
    return surviving_rows(read_record(run_dir).rows)


def surviving_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of the newest attempt wherever attempts overlap, for rows in written order.

    A run that goes back to a checkpoint repeats a step; from there on, what was written before is undone. Evaluations
    after the same step become one row.
    """
    kept: list[Row] = []
    for row in rows:
        if row.is_training:
            while kept and kept[-1].step >= row.step:
                kept.pop()
        elif kept and kept[-1].step == row.step and not kept[-1].is_training:
            row = replace(row, metrics={**kept.pop().metrics, **row.metrics})
        kept.append(row)
    return kept


class Figure:
    """One figure of a run that goes on, by step; each `read` takes in what was written since the last."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.path, self.name = run_dir / METRICS_FILE, name
        self._values: dict[int, float] = {}
        self._place, self._step = 0, 0

    def read(self) -> Mapping[int, float]:
        """Finite values of the rows that stand."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._place)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._place += len(line)
                    self._take(_parse(line.decode(errors="replace")))
        return self._values

    def _take(self, row: Row | None) -> None:
        if row is None:
            return
        if row.is_training and row.step <= self._step:  # the run went back
            self._values = {step: value for step, value in self._values.items() if step < row.step}
        self._step = row.step
        value = row.metrics.get(self.name, math.nan)
        if math.isfinite(value):
            self._values[row.step] = value


def _parse(line: str) -> Row | None:
    """A row, or None for a line that was cut short or is no row."""
    try:
        content = parse_json(line)
        metrics = {name: value for name, value in content.items() if name not in _NOT_METRICS}
        row = Row(
            step=content["step"],
            samples=content["samples"],
            attempt=content["attempt"],
            time=content["time"],
            metrics={name: math.nan if value is None else value for name, value in metrics.items()},
            skipped=content.get("skipped", False),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row if _is_sound(row) and all(map(_is_metric, metrics.items())) else None


def _is_sound(row: Row) -> bool:
    counts = (row.step, row.samples, row.attempt)
    in_time = fits(row.time, float) and 0 <= row.time <= LATEST_TIME
    return in_time and all(fits(count, int) and count >= 0 for count in counts) and isinstance(row.skipped, bool)


def _is_metric(named: tuple[str, object]) -> bool:
    name, value = named
    return len(name) <= MAX_NAME and (value is None or fits(value, float))
