"""What W&B is told, read back by its own inspector, and what a server that fails or hangs may cost."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from run_reports import facts, report, write

from mmpretrain.config import configs_folder
from mmpretrain.core.errors import ClusterError, ConfigError, DataError
from mmpretrain.tracking.background import Worker
from mmpretrain.tracking.wandb import WandbConfig, run_id
from mmpretrain.tracking.wandb_replay import replay
from mmpretrain.tracking.wandb_workspace import build as build_workspace
from mmpretrain.tracking.wandb_workspace import save


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
    steps |= {"train/mfu", "train/tflops_per_gpu"}
    steps |= {"perf/samples_per_s", "perf/data_pct", "rank/slowest", "mem/host_rss_gib"}
    steps |= {f"rank/busy_s_{name}" for name in ("min", "med", "max")}
    known = steps | {"val/i2t_r@1", "val/zeroshot_top1", "val/mlm_acc"}
    panels = [panel for section in workspace.sections for panel in section.panels]
    assert len(panels) == 19 and {panel.x for panel in panels} == {"train/step"}
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
