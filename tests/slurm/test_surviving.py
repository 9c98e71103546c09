"""A run on a real cluster is preempted, crashes and hangs, and ends as if nothing had happened.

Real slurmctld, slurmd, sbatch and srun; two nodes with one gloo rank each under ZeRO-2.
"""

from pathlib import Path

import pytest
from cluster import comment_of, overrides, preempt, submit_run
from launch import run_module, run_ranks

from launcher.chaos.comparison import compare
from launcher.chaos.faults import Site, faults_at
from launcher.chaos.subject import Subject
from launcher.diagnosis import doctor_run
from launcher.history import Action, Attempt, Ending
from launcher.progress import duration
from launcher.status import status_of
from launcher.story import why
from mmpretrain.config import configs_folder
from mmpretrain.core import run_files

pytestmark = pytest.mark.usefixtures("two_nodes")
STRIKE = {fault.name: fault.strike for fault in faults_at("slurm")}
SITE = Site("slurm", nodes=2)


def train_uninterrupted(project: Path) -> Subject:
    """The same config with no scheduler."""
    output = project / "whole"
    arguments = [str(configs_folder() / "chaos.yaml"), *overrides(project), f"output={output}"]
    run_ranks(2, run_module, "mmpretrain.train", arguments)
    return Subject(output)


def assert_resumed_soon(preempted: Attempt, later: Attempt, told: str) -> None:
    """Signal, save, queue and start in under a minute, by the run's own clocks. What a busy machine needs to start
    Python and its libraries once more is no matter of the launcher, and so left out of the bound."""
    assert preempted.asked is not None and later.first_step_s is not None
    recovered = preempted.recovered_s(later)
    assert recovered is not None and recovered - later.first_step_s < 60 - 15
    assert f"training again {duration(recovered)} after it was told to end" in told


def test_a_run_survives_preemption_a_crash_and_a_hang_with_the_numbers_of_an_uninterrupted_one(project: Path) -> None:
    whole = train_uninterrupted(project)
    run = submit_run(project, "checkpoint.every=20", faulty=True)
    run.wait_for_step(5)
    assert comment_of(run.job).startswith("step ")

    preempt(nodes=2, seconds=3)
    run.wait_for_step(1, attempt=1)
    preempted = run.history[0]
    assert (preempted.ending, preempted.action, preempted.nodes) == (Ending.PREEMPTED, Action.REQUEUE, ("n1", "n2"))
    assert preempted.reason.startswith("preemption; ") and preempted.step == preempted.saved_step > 0

    STRIKE["rank-killed"](run, SITE)
    run.wait_for_step(run.step + 2, attempt=2)
    crashed = run.history[1]
    assert (crashed.ending, crashed.action) == (Ending.CRASHED, Action.RESTART)

    survivor = run_files.read_ranks(run.run)
    STRIKE["hang"](run, SITE)
    run.wait_for_step(1, attempt=3)
    hung = run.history[2]
    assert (hung.ending, hung.action) == (Ending.HUNG, Action.RESTART)
    assert "rank 1 on n2 is at" in hung.reason and "faulty_train.py" in hung.reason and "in hang" in hung.reason
    assert not any(Path(f"/proc/{rank.pid}").exists() for rank in survivor)
    stacks = run.run / "stacks" / "attempt-2"
    assert "distributed_c10d.py" in (stacks / "rank-0.txt").read_text()

    run.wait_for_end()
    assert run.history[-1].ending is Ending.COMPLETED
    compared = compare(run, whole, skipped=[])
    assert compared.is_equal and (compared.losses, compared.samples) == (150, 150), str(compared)
    assert run.rows("samples.jsonl") == whole.rows("samples.jsonl")
    told = why(run.run)
    for part in ("preemption", "ranks ended without an outcome", "hung", "completed", "goodput"):
        assert part in told
    assert_resumed_soon(preempted, run.history[1], told)
    assert status_of(run.run).state == "completed"
    assert "mmpretrain publish" in doctor_run(run.run)
