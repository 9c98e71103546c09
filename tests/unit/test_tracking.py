"""What trackers leave behind, read back by others: json and TensorBoard's reader."""

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from run_reports import facts, report, write

from mmpretrain.core.errors import ClusterError, ConfigError, DataError
from mmpretrain.core.registry import discover
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.base import Outcome, RunFacts, Tracker, TrackerConfig
from mmpretrain.tracking.console import ConsoleTracker
from mmpretrain.tracking.fanout import build_trackers
from mmpretrain.tracking.figures import duration, significant
from mmpretrain.tracking.jsonl import JsonlConfig, JsonlTracker
from mmpretrain.tracking.record import read_metrics, read_record
from mmpretrain.tracking.tensorboard import TensorBoardConfig

# metrics.jsonl


def test_a_row_is_on_disk_before_log_returns(tmp_path: Path) -> None:
    tracker = JsonlConfig().build(facts(tmp_path))
    tracker.log(report(1, 2.5))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert abs(row.pop("time") - (tmp_path / "metrics.jsonl").stat().st_mtime) < 5
    assert row == {"step": 1, "samples": 4, "attempt": 0, "train/loss": 2.5}


def test_figures_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 0)
    tracker.log(StepReport(1, 4, {"train/loss": math.nan, "train/lr": 0.1, "train/grad_norm": -math.inf}, skipped=True))
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["nonfinite"] == ["train/loss", "train/grad_norm"]
    assert (row["train/loss"], row["train/lr"], row["skipped"]) == (None, 0.1, True)
    read = read_metrics(tmp_path)[0]
    assert math.isnan(read.metrics["train/loss"])
    assert read.skipped


def test_a_resumed_run_appends_and_the_newest_attempt_wins_overlaps(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8), loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, 1, range(5, 7), loss=2.0)
    write(tmp_path, 2, range(6, 10), loss=3.0)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    assert len(read_record(tmp_path).rows) == 7 + 2 + 4
    assert [(row.step, row.attempt) for row in read_metrics(tmp_path)] == [
        *[(1, 0), (2, 0), (3, 0), (4, 0), (5, 1)],
        *[(6, 2), (7, 2), (8, 2), (9, 2)],
    ]


def test_what_an_attempt_evaluated_past_the_checkpoint_is_undone_with_its_steps(tmp_path: Path) -> None:
    for attempt, steps in ((0, range(1, 5)), (1, range(3, 5))):
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", attempt)
        for step in steps:
            tracker.log(report(step))
            tracker.log_evaluation(step, 4 * step, {"val/a": float(attempt)})
            tracker.log_evaluation(step, 4 * step, {"val/b": 5.0})
    kept = [(row.step, dict(row.metrics)) for row in read_metrics(tmp_path) if not row.is_training]
    assert kept == [(step, {"val/a": float(step > 2), "val/b": 5.0}) for step in (1, 2, 3, 4)]


def test_a_torn_last_line_is_counted_and_never_joins_the_next_attempt(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3), loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "samples": 12, "attem')
    write(tmp_path, 1, range(3, 5), loss=2.0)
    path.write_bytes(path.read_bytes()[:-9])
    assert [row.step for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert read_record(tmp_path).torn == 2


def test_a_full_disk_ends_the_run_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    trackers = build_trackers([], facts(tmp_path))
    with pytest.raises(ClusterError, match=r"metrics.jsonl cannot be written \(No space left on device\); free space"):
        trackers.log(report(1))


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the folder of a run that has finished a step"):
        read_record(tmp_path)


# console


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_plain_output_is_one_line_every_few_steps(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    run = facts(tmp_path)
    tracker = ConsoleTracker(run, Console(file=out, width=60, soft_wrap=True), clock)
    for step in range(1, 13):
        clock.seconds += 2.0
        timing = {"perf/step_s": 0.5, "perf/data_pct": 1.6, "train/lr": 9.8e-4}
        losses = {"train/loss_itc": 1.25, "train/loss_[mlm]": 3.1}
        tracker.log(report(step, 2.31, skipped=step == 4, **losses, **timing))
    tracker.log_evaluation(12, 48, {"val/i2t_r@1": 0.5, "val/i2t_chance_r@1": 0.001})
    tracker.note("checkpoint saved [here]")
    tracker.close("completed")
    assert out.getvalue().splitlines() == [
        f"tiny begins: 30 steps of 4 samples, in {tmp_path}",
        "step 1/30 | loss 2.31 (itc 1.25 [mlm] 3.10) | lr 9.8e-4 | data 2% | eta -",
        "step 4 skipped: a loss or gradient was not finite",
        "step 10/30 | loss 2.31 (itc 1.25 [mlm] 3.10) | lr 9.8e-4 | 8.00 samples/s | data 2% | eta 0:40",
        "evaluation at step 12 | i2t_r@1 0.500",
        "checkpoint saved [here]",
        "completed after step 12, 0:24 in this attempt",
    ]


def test_an_evaluation_of_many_figures_is_told_in_tables(tmp_path: Path) -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(facts(tmp_path), Console(file=out, width=60, soft_wrap=True))
    ranks = {"r@1": 0.5, "r@5": 0.75, "median_rank": 12.0, "chance_r@1": 0.001, "chance_r@5": 0.005}
    figures = {f"val/{way}_{name}": value for way in ("i2t", "t2a") for name, value in ranks.items()}
    tracker.log_evaluation(12, 48, {**figures, "val/i2t_new": 3.0, "val/seconds": 12.5})
    assert [line.rstrip() for line in out.getvalue().splitlines()[1:]] == [
        "evaluation at step 12",
        "  Retrieval       R@1    R@5  median rank  chance R@1",
        "  image → text  0.500  0.750         12.0     0.00100",
        "  text → audio  0.500  0.750         12.0     0.00100",
        "  i2t_new 3.00 | seconds 12.5",
    ]


def test_a_terminal_shows_a_bar_that_keeps_up(tmp_path: Path) -> None:
    out = io.StringIO()
    tracker = ConsoleTracker(facts(tmp_path), Console(file=out, width=120, force_terminal=True, soft_wrap=True))
    for step in range(1, 31):
        tracker.log(report(step, 2.0, **{"perf/step_s": 0.1}))
    tracker.close("completed")
    assert "step 30/30" in out.getvalue()
    assert "100%" in out.getvalue()


def test_figures_read_as_people_write_them() -> None:
    values = [0.0, 2.3149, 0.5, 410.4, 12345.6, 9.8e-4, 1e-7, math.nan]
    assert [significant(value) for value in values] == [
        *["0.00", "2.31", "0.500", "410", "12,346", "9.8e-4", "1.0e-7", "nan"]
    ]
    assert [duration(seconds) for seconds in (83, 3599.6, 11045)] == ["1:23", "1:00:00", "3:04:05"]


# fan-out


class BrittleConfig(TrackerConfig):
    kind: Literal["brittle"] = "brittle"

    def build(self, run: RunFacts) -> Tracker:
        return Brittle()


class UnbuildableConfig(TrackerConfig):
    kind: Literal["unbuildable"] = "unbuildable"

    def build(self, run: RunFacts) -> Tracker:
        raise RuntimeError("no such service")


class Brittle:
    def log(self, report: StepReport) -> None:
        raise ZeroDivisionError("a bug in some library")

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = build_trackers([BrittleConfig(), UnbuildableConfig()], facts(tmp_path))
    assert trackers.kinds == ["jsonl", "console", "brittle"]
    for step in (1, 2, 3):
        trackers.log(report(step))
    trackers.close("completed")
    assert len(read_metrics(tmp_path)) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "the unbuildable tracker failed and is dropped; the run goes on: RuntimeError: no such service",
        "the brittle tracker failed and is dropped; the run goes on: ZeroDivisionError: a bug in some library",
    ]


def test_trackers_register_by_being_in_the_folder_and_load_no_heavy_library() -> None:
    assert {"console", "jsonl", "tensorboard", "wandb"} <= set(discover("mmpretrain.tracking", TrackerConfig))
    code = (
        "import sys; from mmpretrain.core.registry import discover; from mmpretrain.tracking.base import TrackerConfig;"
        "discover('mmpretrain.tracking', TrackerConfig);"
        "print([name for name in ('torch', 'wandb', 'tensorboard', 'matplotlib', 'PIL') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


# TensorBoard


def test_tensorboard_reads_back_every_due_step_of_a_resumed_run(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for attempt, start in ((0, 0), (1, 10)):
        tracker = TensorBoardConfig().build(facts(tmp_path, attempt, start))
        for step in range(start + 1, 31 if attempt else 23):
            tracker.log(report(step, float(attempt)))
        tracker.close("completed")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert points == {1: 0.0, 10: 0.0, 11: 1.0, 20: 1.0, 30: 1.0}


def test_tensorboard_that_is_not_installed_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"not installed; run `pip install 'mmpretrain\[tensorboard\]'`"):
        build_trackers([TensorBoardConfig()], facts(tmp_path))
