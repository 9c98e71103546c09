"""The parts around the step: schedule, parameter groups, the guarded optimizer, hooks, retention, DeepSpeed's dict."""

import json
import math
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from mmpretrain.config import RunConfig, configs_folder, load_run_config
from mmpretrain.config_checkpoint import CheckpointConfig
from mmpretrain.core.errors import CheckpointError, ClusterError, ConfigError, DivergenceError
from mmpretrain.core.run_files import read_heartbeat, read_outcome
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.record import Figure
from mmpretrain.training.engine import check_precision, deepspeed_config
from mmpretrain.training.hooks import Every, Requested, StopOnDivergence, Verdict, WarnBelow
from mmpretrain.training.loss_scale import LossScale
from mmpretrain.training.manifest import read_manifest
from mmpretrain.training.optimizer import GuardedAdamW, parameter_groups
from mmpretrain.training.ranks import on_main
from mmpretrain.training.retention import retain
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.run_lock import RunTaken, lock_run
from mmpretrain.training.schedule import learning_rate


def run(*overrides: str) -> RunConfig:
    return load_run_config(configs_folder() / "demo.yaml", ("steps=100", "optimizer.lr=0.5", *overrides))


def report(step: int, *, skipped: bool = False, stop: bool = False, save: bool = False) -> StepReport:
    return StepReport(step, step, {}, skipped, keys=("a/1", "a/2"), stop_requested=stop, save_requested=save)


def test_cosine_rises_linearly_and_falls_to_its_floor() -> None:
    config = run("schedule.warmup=10", "schedule.final_fraction=0.2")
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    expected = [0.5 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * n / 90))) for n in range(91)]
    assert rates[10:] == pytest.approx(expected)


def test_warmup_in_samples_counts_whole_steps() -> None:
    config = run("schedule.warmup=320", "schedule.unit=samples", "schedule.kind=linear")
    assert config.global_batch_size == 64
    assert [learning_rate(config, step) for step in (0, 4, 5, 100)] == pytest.approx([0.1, 0.5, 0.5, 0.0])


def test_a_constant_schedule_stays_at_its_peak() -> None:
    config = run("schedule.warmup=0", "schedule.kind=constant")
    assert {learning_rate(config, step) for step in range(100)} == {0.5}


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "scale": nn.Linear(1, 1, bias=False)})
    frozen = nn.Linear(2, 2).requires_grad_(False)
    decayed, others = parameter_groups(nn.ModuleList([model, frozen]), 0.1)
    assert decayed["weight_decay"] == 0.1 and decayed["params"] == [model["linear"].weight]
    assert others["weight_decay"] == 0.0
    assert {tuple(p.shape) for p in others["params"]} == {(4,), (1, 1)} and len(others["params"]) == 4


def test_the_guarded_optimizer_is_adamw_after_clipping() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    guarded = GuardedAdamW([{"params": [ours], "weight_decay": 0.1}], clip_grad_norm=1.0, lr=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(5) * 3
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        guarded.step()
        reference.step()
        assert guarded._global_grad_norm == pytest.approx(norm.item()) and not guarded.overflow
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_the_guarded_optimizer_leaves_weights_alone_when_a_gradient_is_not_finite() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = GuardedAdamW([{"params": [parameter]}], clip_grad_norm=1.0, lr=0.01)
    parameter.grad = torch.tensor([1.0, float("inf"), 0.0])
    optimizer.step()
    assert optimizer.overflow and torch.equal(parameter, torch.ones(3)) and not optimizer.state


def test_deepspeed_is_told_what_the_run_says() -> None:
    generated = deepspeed_config(run("zero_stage=3", "engine.offload=optimizer"), backwards_per_step=4, world=2)
    assert generated["gradient_accumulation_steps"] == 4 and generated["train_batch_size"] == 8
    assert generated["gradient_clipping"] == 1.0
    assert generated["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "memory_efficient_linear": False,
    }
    assert "bf16" not in generated and "fp16" not in generated


def test_further_deepspeed_keys_pass_and_contradictions_are_refused() -> None:
    extra = run("engine.deepspeed={zero_optimization: {overlap_comm: false}}")
    assert deepspeed_config(extra, 1, 1)["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    clash = run("engine.deepspeed={zero_optimization: {stage: 1}}")
    with pytest.raises(ConfigError, match=r"engine.deepspeed.zero_optimization.stage: 1 contradicts 2"):
        deepspeed_config(clash, 1, 1)


def test_fp16_is_refused_without_cuda() -> None:
    with pytest.raises(ClusterError, match="fp16 needs a CUDA device and this run is on cpu; use precision: bf16"):
        check_precision(run("precision=fp16"), torch.device("cpu"))


def test_a_loss_scale_moves_as_that_of_pytorch() -> None:
    """Where PyTorch's does not fall below 1, which ours never does."""
    scale, steps = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    ours = LossScale()
    for step in range(9000):
        skipped = step in (0, 1, 5, 2004, 2006, 7000)
        torch._amp_update_scale_(scale, steps, torch.tensor(float(skipped)), 2.0, 0.5, 2000)
        ours = ours.after(skipped)
        assert (ours.value, ours.steps) == (scale.item(), steps.item()), step
    assert LossScale(1.5).after(skipped=True) == LossScale(1.0)


def test_every_answers_at_its_interval_and_at_the_end() -> None:
    hook = Every(4, 10, Verdict.SAVE)
    assert [step for step in range(1, 11) if Verdict.SAVE in hook(report(step))] == [4, 8, 10]
    assert [step for step in range(1, 11) if Every(0, 10, Verdict.EVALUATE)(report(step))] == [10]


def test_a_requested_stop_saves_first() -> None:
    assert Requested()(report(1, stop=True)) == Verdict.SAVE | Verdict.STOP
    assert Requested()(report(1, save=True)) == Verdict.SAVE
    assert Requested()(report(1)) == Verdict.NOTHING


def test_skipped_steps_in_a_row_stop_the_run_past_their_budget() -> None:
    hook = StopOnDivergence(budget=2)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        hook(report(step, skipped=skipped))
    with pytest.raises(DivergenceError, match=r"3 steps in a row .* \(budget: max_skipped_steps=2\).*before step 4"):
        hook(report(6, skipped=True))


def test_a_figure_below_its_floor_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    hook = WarnBelow("train/target_std", 0.1, "the teacher says the same of every patch")
    for step, value in enumerate([0.5, 0.09, 0.01], start=1):
        metrics = {"train/target_std_image": value, "train/loss": 0.0}
        assert hook(StepReport(step, step, metrics)) == Verdict.NOTHING
    assert [record.message for record in caplog.records] == [
        "step 2: train/target_std_image is 0.09, below 0.1: the teacher says the same of every patch"
    ]


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    retain(tmp_path, 70, CheckpointConfig(every=10, keep_last=2, keep_every=30), {})
    assert steps_in(tmp_path) == [30, 60, 70]


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(("mode", "kept"), [("max", [20, 40, 70]), ("min", [10, 30, 70])])
def test_retention_keeps_the_best_of_those_that_were_measured(tmp_path: Path, mode: str, kept: list[int]) -> None:
    for step in range(10, 80, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    rules = CheckpointConfig.model_validate(
        {"every": 10, "keep_last": 1, "keep_best": {"metric": "val/i2t_r@1", "mode": mode, "count": 2}}
    )
    retain(tmp_path, 70, rules, {10: 0.1, 20: 0.5, 30: 0.1, 40: 0.9, 35: 7.0, 50: 0.3})
    assert steps_in(tmp_path) == kept


def test_retention_never_deletes_the_newest_valid_one_nor_one_that_is_read(tmp_path: Path) -> None:
    """Steps 80 and 90 are damaged: the run passed them over and comes from 60."""
    for step in (50, 60, 70, 80, 90):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / ".step-00000030.removed").mkdir()
    (tmp_path / ".step-00000085.partial").mkdir()
    retain(tmp_path, 70, CheckpointConfig(every=10, keep_last=1), {}, in_use=[50])
    assert steps_in(tmp_path) == [50, 70, 80, 90]


def test_a_figure_is_followed_through_returns_and_torn_lines(tmp_path: Path) -> None:
    followed, path = Figure(tmp_path, "val/x"), tmp_path / "metrics.jsonl"
    assert followed.read() == {}

    def row(step: int, **metrics: float | None) -> str:
        return json.dumps({"step": step, "samples": step, "attempt": 0, "time": 0.0} | metrics) + "\n"

    path.write_text("".join(row(n, **{"train/loss": 1.0}) + row(n, **{"val/x": n / 10}) for n in (1, 2, 3)) + '{"st')
    assert followed.read() == {1: 0.1, 2: 0.2, 3: 0.3}
    with path.open("a") as file:
        file.write("\n" + row(2, **{"train/loss": 1.0}) + row(2, **{"val/x": None}) + row(4, **{"val/x": 7.0}))
    assert followed.read() == {1: 0.1, 4: 7.0}


def test_a_manifest_of_another_format_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads format 2"):
        read_manifest(tmp_path)


def test_traces_go_back_to_the_checkpoint_a_run_continues_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [json.dumps({"step": step, "keys": []}) for step in range(1, 6)]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + '\n{"step": 6, "ke')
    skips = [{"position": position} for position in (5, 11, 12, 30)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(skip) + "\n" for skip in skips))
    folder.rewind(3, position=12)
    assert [json.loads(row)["step"] for row in (tmp_path / "samples.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert [json.loads(row) for row in (tmp_path / "ledger.jsonl").read_text().splitlines()] == skips[:2]


def test_what_the_main_rank_refuses_is_raised() -> None:
    def refuse() -> None:
        raise ConfigError("not so")

    assert on_main(lambda: 3) == 3
    with pytest.raises(ConfigError, match="not so"):
        on_main(refuse)


def test_the_heartbeat_tells_each_phase_and_steps_again_after_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.begin_attempt(1, "CPU", last_step=9) == 0
    beats = [read_heartbeat(tmp_path)]
    metrics = {"train/loss": math.nan, "perf/step_s": 0.5, "perf/samples_per_s": 4.0}
    folder.beat(StepReport(3, 6, metrics))
    beats.append(read_heartbeat(tmp_path))
    with folder.phase("save", 3):
        beats.append(read_heartbeat(tmp_path))
    beats.append(read_heartbeat(tmp_path))
    assert [(beat.phase, beat.step, beat.last_step) for beat in beats if beat] == [
        ("start", 0, 9),
        ("step", 3, 9),
        ("save", 3, 9),
        ("step", 3, 9),
    ]
    assert beats[1] is not None and (beats[1].loss, beats[1].step_s) == (None, 0.5)


def test_a_run_that_is_started_again_keeps_its_place_and_a_refused_start_its_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt(1, "CPU", last_step=9)
    folder.beat(StepReport(9, 18, {"train/loss": 0.25, "perf/step_s": 0.5, "perf/samples_per_s": 4.0}))
    folder.write_outcome("completed", 9, "9 of 9 steps done")
    ended, last = read_outcome(tmp_path), read_heartbeat(tmp_path)
    refused = RunFolder(tmp_path)
    refused.begin_attempt(1, "CPU", last_step=20)
    refused.refuse_attempt("another model")
    assert (read_outcome(tmp_path), read_heartbeat(tmp_path)) == (ended, last)
    again = RunFolder(tmp_path)
    again.begin_attempt(1, "CPU", last_step=9)
    again.begin_steps(9)
    beat = read_heartbeat(tmp_path)
    assert beat is not None and (beat.step, beat.loss, beat.attempt, beat.phase) == (9, 0.25, 2, "start")
    again.begin_attempt(1, "CPU", last_step=9)  # as a supervisor does, which takes the outcome away
    again.refuse_attempt("its shards are gone")
    given_up = read_outcome(tmp_path)
    assert given_up is not None and (given_up.state, given_up.step) == ("fatal", 9)


def test_one_process_trains_in_a_run_folder(tmp_path: Path) -> None:
    """The other is a child, which ends when this one lets go of their line."""
    (tmp_path / "ranks").mkdir()
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        here.close()
        lock_run(tmp_path)
        RunFolder(tmp_path).write_rank(0)
        there.send(b"locked")
        there.recv(1)
        os._exit(0)
    there.close()
    assert here.recv(6) == b"locked"
    with pytest.raises(
        RunTaken, match=rf"is being trained by process {child} on .*; stop it \(touch .*/control/stop\)"
    ):
        lock_run(tmp_path, patience_s=0)
    here.close()
    lock_run(tmp_path)
    os.waitpid(child, 0)
    lock_run(tmp_path)  # again by the process that has it
