"""What trackers leave behind, read back by others: json, TensorBoard's reader, W&B's own inspector."""

import io
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
import wandb
from rich.console import Console

from mmpretrain.config import configs_folder
from mmpretrain.core.errors import ClusterError, ConfigError, DataError
from mmpretrain.core.registry import discover
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.background import Worker
from mmpretrain.tracking.base import Outcome, RunFacts, Tracker, TrackerConfig
from mmpretrain.tracking.console import ConsoleTracker
from mmpretrain.tracking.fanout import build_trackers
from mmpretrain.tracking.figures import duration, significant
from mmpretrain.tracking.jsonl import JsonlConfig, JsonlTracker
from mmpretrain.tracking.record import read_metrics, read_record
from mmpretrain.tracking.tensorboard import TensorBoardConfig
from mmpretrain.tracking.wandb import WandbConfig, run_id
from mmpretrain.tracking.wandb_replay import replay
from mmpretrain.tracking.wandb_workspace import build as build_workspace
from mmpretrain.tracking.wandb_workspace import save


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
        self, step: int, samples: int, metrics: Mapping[str, float], images: Mapping[str, Path] | None = None
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


# W&B


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A W&B session of its own, which reads the environment anew and finds no key in it."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    yield
    wandb.teardown()


def _items(history: object) -> dict[str, object]:
    """One history record as a row."""
    assert isinstance(history, dict)
    row: dict[str, object] = history["item"]
    return row


def inspect(run_dir: Path, *options: str) -> list[dict[str, object]]:
    """The records of the newest offline run, as W&B's own inspector reads them."""
    inspector = Path(sys.executable).parent / "wandb"
    newest = max(run_dir.glob("wandb/offline-run-*"))
    output = subprocess.run(
        [inspector, "leet", "inspect", "--json", *options, newest], capture_output=True, text=True, check=True
    ).stdout
    return [json.loads(output)] if options else [json.loads(line) for line in output.splitlines()]


@pytest.mark.usefixtures("no_key")
def test_without_a_key_the_run_is_recorded_offline_under_one_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt, start in ((0, 0), (1, 20)):
        tracker = WandbConfig(project="p", tags=("small",)).build(facts(tmp_path, attempt, start))
        for step in range(start + 1, start + 11):
            tracker.log(report(step, 1.0 / step))
        tracker.log_evaluation(start + 10, 4 * (start + 10), {"val/i2t_r@1": 0.5 - 0.2 * attempt})
        tracker.close("completed")
    (summary,) = inspect(tmp_path, "--summary")
    figures = summary["summary"]
    assert isinstance(figures, dict)
    assert (summary["run_id"], summary["state"]) == (run_id(tmp_path), "finished")
    assert summary["config"] == {"seed": 7, "attempt": 1}
    assert (figures["train/step"], figures["train/loss"]) == (30, 1.0 / 30)
    assert figures["val/i2t_r@1"] == {"max": 0.3}
    run = next(record["run"] for record in inspect(tmp_path) if record["type"] == "run")
    assert isinstance(run, dict)
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("trials", "train", "tiny")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert [record.getMessage().split(";")[0] for record in caplog.records if record.name.startswith("mmpretrain")] == [
        "W&B has no API key (`wandb login` sets one)"
    ] * 2


@pytest.mark.usefixtures("no_key")
def test_a_server_out_of_reach_costs_the_timeout_and_one_warning_that_hides_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = WandbConfig(init_timeout_s=1.0).build(facts(tmp_path))
    tracker.log(report(1))
    tracker.close("preempted")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("mmpretrain")]
    assert warning.startswith("W&B cannot be used (")
    assert warning.endswith(f"`mmpretrain wandb sync {tmp_path}` uploads it later, as one run")
    assert key not in caplog.text
    assert inspect(tmp_path, "--summary")[0]["step"] == 0


@pytest.mark.usefixtures("no_key")
def test_three_attempts_are_replayed_as_one_run_of_every_step_once(tmp_path: Path) -> None:
    for attempt, steps in enumerate((range(1, 9), range(6, 14), range(11, 21))):
        tracker = WandbConfig().build(facts(tmp_path, attempt, steps.start - 1))
        tracker.close("crashed")
        write(tmp_path, attempt, steps, loss=float(attempt))
    replayed = replay(tmp_path)
    assert (replayed.rows, replayed.last_step, replayed.online) == (20, 20, False)
    history = [_items(record["history"]) for record in inspect(tmp_path) if record["type"] == "history"]
    assert [row["train/step"] for row in history] == list(range(1, 21))
    assert [row["train/loss"] for row in history] == [0.0] * 5 + [1.0] * 5 + [2.0] * 10
    (summary,) = inspect(tmp_path, "--summary")
    assert (summary["run_id"], summary["state"]) == (run_id(tmp_path), "finished")
    assert replayed.folder == max(tmp_path.glob("wandb/offline-run-*"))


def test_a_folder_without_rows_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sam')
    with pytest.raises(DataError, match="holds no whole row; there is nothing to replay"):
        replay(tmp_path)


def test_a_call_that_fails_is_one_warning_and_the_rest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    worker = Worker("W&B")
    for index in range(5):
        worker.submit(lambda index=index: done.append(1 // (2 - index)))
    assert not worker.close(5.0)
    assert done == [0, 1]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mmpretrain")] == [
        "W&B failed and is dropped; the run goes on: ZeroDivisionError: integer division or modulo by zero"
    ]


def test_a_hanging_call_stalls_neither_submit_nor_close(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    worker = Worker("W&B", length=2)
    for _ in range(10):
        worker.submit(lambda: release.wait(30) and None)
    assert not worker.close(0.05)
    release.set()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mmpretrain")] == [
        "W&B is 2 calls behind; rows are missing there, metrics.jsonl has all"
    ]


def test_the_workspace_shows_metrics_that_runs_have() -> None:
    """Every name and pattern of the workspace finds a figure that a step or an evaluation of a run reports."""
    workspace = build_workspace(configs_folder() / "tracking" / "wandb-workspace.yaml", "team", "trials")
    steps = {"train/loss", "train/loss_itc", "train/lr", "train/grad_norm", "train/spike_score", "train/skipped_steps"}
    steps |= {"train/logit_scale", "embed/pos_sim", "embed/neg_sim", "embed/modality_gap", "embed/in_batch_r1"}
    steps |= {"perf/samples_per_s", "perf/data_pct", "rank/slowest", "mem/host_rss_gib"}
    steps |= {f"rank/busy_s_{name}" for name in ("min", "med", "max")}
    known = steps | {"val/i2t_r@1", "val/zeroshot_top1", "val/mlm_acc"}
    panels = [panel for section in workspace.sections for panel in section.panels]
    assert len(panels) == 17 and {panel.x for panel in panels} == {"train/step"}
    for panel in panels:
        assert set(panel.y or ()) <= known, panel.title
        assert panel.y or any(re.fullmatch(panel.metric_regex, name) for name in known), panel.title


def test_a_panel_of_neither_names_nor_pattern_is_refused(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("sections: {Loss: [{title: Empty}]}")
    with pytest.raises(ConfigError, match="panel 'Empty' needs either metrics or a pattern"):
        build_workspace(spec, "team", "trials")


@pytest.mark.usefixtures("no_key")
def test_a_workspace_is_not_saved_without_a_key() -> None:
    with pytest.raises(ClusterError, match="no API key; `wandb login` sets one, or --dry-run prints the workspace"):
        save(build_workspace(configs_folder() / "tracking" / "wandb-workspace.yaml", "team", "trials"))


@pytest.mark.usefixtures("no_key")
def test_a_checkpoint_is_a_reference_in_wandb_and_not_uploaded(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.safetensors").write_bytes(b"weights")
    tracker = WandbConfig().build(facts(tmp_path))
    tracker.saved(10, checkpoint)
    tracker.alert("loss spike", "step 9 stands 8.0 sigma above the steps before it")
    tracker.close("completed")
    records = inspect(tmp_path)
    text = json.dumps(records)
    assert checkpoint.as_uri() in text and "step-00000010" in text
    assert "step 9 stands 8.0 sigma" in text
    assert not list(tmp_path.glob("wandb/**/*.safetensors"))
