"""What status, why, doctor and logs say of run folders in every state, made as runs and supervisors leave them."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launcher.diagnosis import doctor_run
from launcher.history import Action, Attempt, Ending, History
from launcher.logs import last_lines, log_file
from launcher.machine import doctor_machine
from launcher.progress import duration, progress_line
from launcher.slurm_commands import _parse
from launcher.snapshot import config_file
from launcher.spec import JobSpec, job_file
from launcher.status import find_runs, status_of, table_of
from launcher.story import goodput, why
from launcher.top import view
from mmpretrain.cli import main
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.run_files import Heartbeat, Outcome

T0 = 1_700_000_000.0
FIRST = Attempt(
    attempt=0,
    began=T0,
    nodes=("n1", "n2"),
    job="7",
    from_step=0,
    ended=T0 + 100,
    ending=Ending.CRASHED,
    action=Action.RESTART,
    reason="ranks ended without an outcome",
    step=50,
    saved_step=40,
    first_step_s=20.0,
)
SECOND = replace(
    FIRST,
    attempt=1,
    began=T0 + 110,
    ended=T0 + 210,
    from_step=40,
    ending=Ending.PREEMPTED,
    action=Action.REQUEUE,
    reason="preemption; 120 of 200 steps done",
    step=120,
    saved_step=120,
)
THIRD = replace(
    SECOND, attempt=2, began=T0 + 310, ended=T0 + 410, from_step=120, ending=Ending.COMPLETED, action=Action.DONE,
    reason="200 of 200 steps done", step=200, saved_step=200,
)  # fmt: skip


def run_folder(root: Path, attempts: Sequence[Attempt] = (), name: str = "clip") -> Path:
    run = root / name
    for folder in ("launch", "logs", "control"):
        (run / folder).mkdir(parents=True)
    (run / "attempts.jsonl").write_text("{}\n")
    for attempt in attempts:
        History(run).end(attempt)
    return run


def beat(run: Path, step: int, age_s: float = 0.0) -> None:
    heartbeat = Heartbeat(step, 200, "step", 0, 2.25, 0.5, 512.0, time.time() - age_s)
    run_files.write_record(run / "heartbeat.json", heartbeat)


def text_of(*runs: Path) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(table_of([status_of(run) for run in runs]))
    return console.export_text()


def test_why_tells_each_attempt_its_cause_and_the_cost(tmp_path: Path) -> None:
    told = why(run_folder(tmp_path, [FIRST, SECOND, THIRD]))
    for part in (
        "attempt 0, 1 min 40 s on n1, n2 (job 7): steps 0 to 50, crashed",
        "ranks ended without an outcome; 10 steps to do again; started again at once",
        "attempt 1, 1 min 40 s on n1, n2 (job 7): steps 40 to 120, preempted",
        "preemption; 120 of 200 steps done; queued again",
        "3 attempts, 10 steps done twice, goodput 75% of 5 min on nodes, 1 min 40 s between jobs",
    ):
        assert part in told, told


def test_goodput_counts_steps_that_stand_of_all_time_on_nodes() -> None:
    """80 s of steps in each attempt of 100 s; of the first, 40 steps of 50 stand: (64 + 80 + 80) / 300."""
    good = goodput([FIRST, SECOND, THIRD])
    assert good.share == pytest.approx((64 + 80 + 80) / 300)
    assert good.lost_steps == 10


def test_a_run_without_history_is_refused_by_why(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="has no history: no launcher has run it; `mmpretrain report"):
        why(run_folder(tmp_path))


def test_status_joins_heartbeat_history_and_outcome(tmp_path: Path) -> None:
    done = run_folder(tmp_path, [FIRST, SECOND, THIRD], "done")
    beat(done, 200, age_s=1000)
    run_files.write_record(done / "outcome.json", Outcome("completed", 200, "200 of 200 steps done", "", T0))
    alive = run_folder(tmp_path, name="alive")
    beat(alive, 100)
    dead = run_folder(tmp_path, name="dead")
    beat(dead, 100, age_s=10_000)
    left = run_folder(tmp_path, [FIRST], "left")
    History(left).begin(["n1"], "8")
    states = {run.name: status_of(run).state for run in find_runs([tmp_path])}
    assert states == {"alive": "running", "dead": "crashed", "done": "completed", "left": "lost"}
    row = next(line for line in text_of(alive, done).splitlines() if line.startswith("alive"))
    assert row.split()[:7] == ["alive", "running", "100/200", "512", "2.25", "50", "s"]


def test_status_of_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="there are no runs under .*; name the folder that holds them"):
        find_runs([tmp_path])


def test_top_shows_the_runs_and_what_happened_last(tmp_path: Path) -> None:
    run_folder(tmp_path, [FIRST])
    console = Console(width=160, record=True, file=StringIO())
    console.print(view([tmp_path]))
    text = console.export_text()
    assert "1 crashed" in text and "attempt 0 crashed: ranks ended without an outcome" in text


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "a GPU ran out of memory"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "want of host memory"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ModuleNotFoundError: No module named 'torch'", "a Python package is missing on the nodes"),
        ("NVRM: Xid (PCI:0000:3b:00): 79", "hardware fault (Xid)"),
    ],
)
def test_doctor_knows_the_signs_in_a_log_and_says_what_to_type(tmp_path: Path, line: str, cause: str) -> None:
    run = run_folder(tmp_path, [replace(FIRST, action=Action.STOP)])
    (run / "logs" / "job.log").write_text(f"step 1\n{line}\nstep 2\n")
    told = doctor_run(run)
    assert cause in told and line in told
    assert "next: the command that started it, again   (it has none to continue from)" in told
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert "again   (it continues from its newest checkpoint)" in doctor_run(run)


def test_doctor_names_the_odd_rank_of_a_hang_and_where_its_stacks_lie(tmp_path: Path) -> None:
    reason = "no sign of life for 12 s: rank 1 on n2 is at /reader.py:3 in read; the others wait in all_reduce"
    run = run_folder(tmp_path, [replace(FIRST, ending=Ending.HUNG, reason=reason)])
    told = doctor_run(run)
    assert "rank 1 on n2 is at /reader.py:3 in read" in told and str(run / "stacks" / "attempt-0") in told


def submitted(run: Path, time_limit_s: int) -> Path:
    """As a job that saves every 500 steps, and is told to end a minute before its limit."""
    values = {"name": "clip", "run": run, "program": [], "python": "python", "workdir": run, "ranks_per_node": 1}
    values |= {"time_limit_s": time_limit_s, "config_hash": "abc", "cluster": {"signal_lead_s": 60}}
    job_file(run).write_text(JobSpec.model_validate(values).model_dump_json())
    config_file(run, "abc").write_text("checkpoint: {every: 500}\n")
    return run


@pytest.mark.parametrize(
    ("time_limit_s", "save_s", "warnings"),
    [
        (600, 10.0, []),
        (300, 40.0, [
            "the time limit of 5 min is too short for 500 steps of 0.5 s and a save of 40 s, after 20 s of starting: a "
            "crash costs the whole job; lower checkpoint.every to 106 or give more --time",
            "60 s between the scheduler's signal and the end are few for a step of 0.5 s and a save of 40 s; set "
            "signal_lead_s to 81 or more in the cluster file",
        ]),
    ],
)  # fmt: skip
def test_doctor_warns_of_checkpoints_that_do_not_fit_into_the_time_of_a_job(
    tmp_path: Path, time_limit_s: int, save_s: float, warnings: list[str]
) -> None:
    """500 steps of 0.5 s, a save and 20 s of starting: 280 s or 310 s; a third of 280 s less the save is 106 steps."""
    run = submitted(run_folder(tmp_path, [FIRST]), time_limit_s)
    heartbeat = Heartbeat(100, 200, "step", 0, 2.25, 0.5, 512.0, time.time(), save_s)
    run_files.write_record(run / "heartbeat.json", heartbeat)
    told = doctor_run(run)
    assert [
        line.removeprefix("  - ") for line in told.splitlines() if "signal" in line or "time limit" in line
    ] == warnings


def test_doctor_of_a_completed_run_says_how_to_publish_it(tmp_path: Path) -> None:
    run = run_folder(tmp_path, [THIRD])
    run_files.write_record(run / "outcome.json", Outcome("completed", 200, "", "", T0))
    assert f"next: mmpretrain publish {run} --to-dir" in doctor_run(run)


def test_doctor_of_this_machine_looks_at_packages_disk_and_scheduler(tmp_path: Path) -> None:
    told = "\n".join(map(str, doctor_machine(tmp_path)))
    for part in ("ok    torch 2.", "GiB free there", "shared memory free", "lurm", "OMP_NUM_THREADS"):
        assert part in told, told


def test_the_newest_step_is_read_past_a_torn_line(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 3, "tra']))
    assert run_files.last_step(tmp_path) == 2


def test_logs_are_the_jobs_or_a_ranks_and_a_missing_one_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "logs" / "rank-0.log").write_text("a\nb\nc\n")
    assert last_lines(log_file(run, None), 2) == ["b", "c"]
    (run / "logs" / "job.log").write_text("job\n")
    assert last_lines(log_file(run, None), 2) == ["job"]
    with pytest.raises(ClusterError, match="there is no .*rank-3.log; logs there: job.log, rank-0.log"):
        log_file(run, 3)


def test_progress_is_one_line_for_the_scheduler() -> None:
    heartbeat = Heartbeat(100, 200, "save", 0, 2.25, 0.5, 512.0, T0)
    assert progress_line(heartbeat) == "step 100/200 loss 2.25 512 samples/s left 50 s (save)"


def test_durations_are_told_in_two_units() -> None:
    assert [duration(s) for s in (5, 200, 3600, 15_120, 190_000)] == [
        "5 s",
        "3 min 20 s",
        "1 h",
        "4 h 12 min",
        "2 d 4 h",
    ]


def test_a_line_of_squeue_is_read_with_its_time_left() -> None:
    job = _parse("12|10_2|RUNNING|None|n[1-2]|1-02:03:04")
    assert (job.job, job.array_name, job.nodes, job.time_left_s) == ("12", "10_2", "n[1-2]", 93784)
    assert _parse("12|12|PENDING|Resources||UNLIMITED").time_left_s is None


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["status", "{folder}"], "crashed"),
        (["why", "{run}"], "goodput"),
        (["doctor", "{run}"], "next: the command that started it, again"),
        (["logs", "{run}"], "the last words"),
        (["top", "{folder}", "--times", "1"], "attempt 0 crashed"),
    ],
)
def test_the_command_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    run = run_folder(tmp_path, [FIRST])
    (run / "logs" / "job.log").write_text("the last words\n")
    with pytest.raises(SystemExit) as caught:
        main([one.format(folder=tmp_path, run=run) for one in arguments])
    assert caught.value.code == 0
    assert part in capsys.readouterr().out


def test_a_refusal_of_the_launcher_is_one_line_and_exit_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cancel", str(run_folder(tmp_path))])
    assert caught.value.code == 4
    assert "was not submitted; a run of torchrun stops after: touch" in capsys.readouterr().err
