"""metrics.jsonl, the one record of a run that every other view derives from: appended to, never rewritten.

Enter: reports and evaluations. Leave: one JSON object a line: step, samples, attempt, time (seconds since 1970) and
the metrics by name. JSON has no NaN, so a figure that is not finite is null and named under "nonfinite".
Refuses to go on when a row cannot be written, since a run without its record is lost.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from mmpretrain.core.errors import ClusterError
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.base import Outcome, RunFacts, TrackerConfig

METRICS_FILE = "metrics.jsonl"


class JsonlConfig(TrackerConfig):
    """`metrics.jsonl` in the run folder; always on."""

    kind: Literal["jsonl"] = "jsonl"
    required: ClassVar[bool] = True

    def build(self, run: RunFacts) -> "JsonlTracker":
        return JsonlTracker(run.run_dir / METRICS_FILE, run.attempt)


class JsonlTracker:
    """Appends one row per step and per evaluation; a row is with the operating system before the call returns."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._end_torn_line()
        except OSError as fault:
            raise self._refusal(fault) from fault

    def log(self, report: StepReport) -> None:
        self._append(report.step, report.samples, report.metrics, {"skipped": True} if report.skipped else {})

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        self._append(step, samples, metrics, {})

    def note(self, message: str) -> None:
        """Events are no metrics: the console and the log files hold them."""

    def saved(self, step: int, path: Path) -> None:
        """The checkpoint folder tells."""

    def alert(self, title: str, text: str) -> None:
        """Events are no metrics."""

    def close(self, outcome: Outcome) -> None:
        os.close(self._file)

    def _append(self, step: int, samples: int, metrics: Mapping[str, float], extra: Mapping[str, bool]) -> None:
        nonfinite = [name for name, value in metrics.items() if not math.isfinite(value)]
        row: dict[str, object] = {"step": step, "samples": samples, "attempt": self.attempt, "time": time.time()}
        row |= extra
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as fault:
            raise self._refusal(fault) from fault

    def _end_torn_line(self) -> None:
        """A killed attempt can leave half a row; its end must not join with our first one."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def _refusal(self, fault: OSError) -> ClusterError:
        return ClusterError(
            f"{self.path} cannot be written ({fault.strerror}); free space or quota there, or set output to another "
            f"folder, then start the run again: it continues from its newest checkpoint"
        )
