"""A run that is asked to stop saves, says so, and is finished by the same command started again."""

import json
import signal
from collections.abc import Callable

import pytest
from command_line import Process, Project, losses_of, start_torchrun, wait_until

STEPS = 100


def some_steps_done(project: Project) -> bool:
    return len(project.rows("metrics.jsonl")) >= 3


def touch_stop(process: Process, project: Project) -> None:
    (project.output / "control" / "stop").touch()


def send(number: int) -> Callable[[Process, Project], None]:
    return lambda process, project: process.signal(number)


@pytest.mark.parametrize(
    "ask", [send(signal.SIGTERM), send(signal.SIGUSR1), touch_stop], ids=["SIGTERM", "SIGUSR1", "control/stop"]
)
def test_a_run_asked_to_stop_saves_and_is_finished_later(
    project: Project, ask: Callable[[Process, Project], None]
) -> None:
    process = project.start(f"steps={STEPS}", "checkpoint.every=1000")
    wait_until(lambda: some_steps_done(project), "step 3")
    ask(process, project)
    ended = process.wait()
    assert (ended.code, ended.errors) == (75, [])
    state, step = project.outcome()
    assert state == "preempted" and 3 <= step < STEPS
    assert [path.name for path in project.checkpoints] == [f"step-{step:08d}"]
    assert f"preempted after step {step}" in ended.stdout

    ended = project.train(f"steps={STEPS}", "checkpoint.every=1000")
    assert ended.code == 0 and f"continuing from step {step} of {STEPS}" in ended.stderr
    assert project.outcome() == ("completed", STEPS)
    assert [row["step"] for row in project.rows("metrics.jsonl")] == list(range(1, STEPS + 1))


def test_stopping_changes_no_loss(project: Project) -> None:
    whole = project.folder / "whole"
    assert project.train("trace_samples=true", f"output={whole}").code == 0
    (project.output / "control").mkdir(parents=True)
    (project.output / "control" / "stop").touch()
    assert project.train("trace_samples=true").code == 75
    assert project.outcome() == ("preempted", 1)
    assert project.train("trace_samples=true").code == 0
    assert (project.output / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert project.losses() == losses_of(whole)


def test_a_signal_while_the_run_starts_is_not_lost(project: Project) -> None:
    process = project.start(f"steps={STEPS}")
    wait_until((project.output / "attempts.jsonl").exists, "the first attempt")
    process.signal(signal.SIGTERM)
    assert process.wait().code == 75
    assert project.outcome() == ("preempted", 1)


def test_a_checkpoint_can_be_asked_for(project: Project) -> None:
    (project.output / "control").mkdir(parents=True)
    (project.output / "control" / "save").touch()
    assert project.train("checkpoint.every=1000").code == 0
    assert [path.name for path in project.checkpoints] == ["step-00000001", "step-00000006"]
    assert list((project.output / "control").iterdir()) == []


def test_a_completed_run_started_again_ends_at_once(project: Project) -> None:
    assert project.train().code == 0
    ended = project.train()
    assert ended.code == 0 and "completed after step 6" in ended.stdout
    assert project.outcome() == ("completed", 6)
    assert len(project.rows("metrics.jsonl")) == 6


def test_a_run_killed_before_its_first_checkpoint_starts_over_without_old_traces(project: Project) -> None:
    process = project.start(f"steps={STEPS}", "checkpoint.every=1000", "trace_samples=true")
    wait_until(lambda: some_steps_done(project), "step 3")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (project.output / "outcome.json").exists()
    assert project.train("trace_samples=true").code == 0
    assert [row["step"] for row in project.rows("samples.jsonl")] == list(range(1, 7))


def test_ranks_stop_together_when_the_scheduler_signals_their_launcher_and_any_other_way_in_goes_on(
    project: Project,
) -> None:
    overrides = ["micro_batch_size=4", "steps=100000", "checkpoint.every=100000"]
    process = start_torchrun(["train", project.config, *overrides], project.logs, ranks=2)
    wait_until(lambda: some_steps_done(project), "step 3")
    process.signal(signal.SIGTERM)
    process.wait()
    state, step = project.outcome()
    assert state == "preempted"
    assert [path.name for path in project.checkpoints] == [f"step-{step:08d}"]
    (project.output / "control" / "stop").touch()
    assert project.train(*overrides).code == 75
    assert project.outcome() == ("preempted", step + 1)


def test_an_evaluation_stacks_and_a_profile_can_be_asked_for(project: Project) -> None:
    control = project.output / "control"
    control.mkdir(parents=True)
    for name in ("eval", "stacks", "profile:2"):
        (control / name).touch()
    assert project.train("evaluation.tasks.retrieval.kind=retrieval").code == 0
    evaluated = [row["step"] for row in project.rows("metrics.jsonl") if "val/i2t_r@1" in row]
    assert evaluated == [1, 6]
    assert "in ask" in (project.output / "stacks" / "rank-0.txt").read_text()
    trace = json.loads((project.output / "profiles" / "step-00000003.json").read_text())
    assert any("aten::" in event["name"] for event in trace["traceEvents"])
    assert list(control.iterdir()) == []


def test_a_profile_of_no_number_of_steps_is_told_and_passed_over(project: Project) -> None:
    (project.output / "control").mkdir(parents=True)
    (project.output / "control" / "profile:many").touch()
    ended = project.train()
    assert ended.code == 0
    assert "control/profile:many is not followed; write e.g. control/profile:10" in ended.stderr


def test_the_outcome_tells_who_asked_for_the_stop(project: Project) -> None:
    (project.output / "control").mkdir(parents=True)
    (project.output / "control" / "stop").write_text("cancelled by its owner")
    assert project.train().code == 75
    assert json.loads((project.output / "outcome.json").read_text())["reason"] == "cancelled by its owner"
