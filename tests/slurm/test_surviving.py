"""A run on a real cluster is preempted, crashes and hangs, and ends as if nothing had happened.

Real slurmctld, slurmd, sbatch and srun; two nodes with one gloo rank each under ZeRO-2.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import DEADLINE_S, SlurmRun, comment_of, preempt, submit_run
from faulty_train import HANG

from launcher.diagnosis import doctor_run
from launcher.history import Action, Ending
from launcher.status import status_of
from launcher.story import why
from mmpretrain.core import run_files

pytestmark = pytest.mark.usefixtures("two_nodes")


def train_uninterrupted(project: Path) -> SlurmRun:
    """The same config by torchrun alone, with no scheduler."""
    output = project / "whole"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", "mmpretrain.train", str(project / "run.yaml"), f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*launch, *program], env=environment, timeout=DEADLINE_S, check=True, capture_output=True)
    return SlurmRun(output, "")


def assert_same(run: SlurmRun, whole: SlurmRun) -> None:
    """Bitwise the losses, and the very samples of every step."""
    assert run.losses() == whole.losses()
    assert run.rows("samples.jsonl") == whole.rows("samples.jsonl")


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
    assert run.history_with_current[1].began - preempted.ended < 30, "the job waited too long in the queue"

    run.signal_rank(1, signal.SIGKILL)
    run.wait_for_step(run.step + 2, attempt=2)
    crashed = run.history[1]
    assert (crashed.ending, crashed.action) == (Ending.CRASHED, Action.RESTART)

    survivor = run_files.read_ranks(run.run)
    run.signal_rank(1, HANG)
    run.wait_for_step(1, attempt=3)
    hung = run.history[2]
    assert (hung.ending, hung.action) == (Ending.HUNG, Action.RESTART)
    assert "rank 1 on n2 is at" in hung.reason and "faulty_train.py" in hung.reason and "in hang" in hung.reason
    assert not any(Path(f"/proc/{rank.pid}").exists() for rank in survivor)
    stacks = run.run / "stacks" / "attempt-2"
    assert "distributed_c10d.py" in (stacks / "rank-0.txt").read_text()

    run.wait_for_end()
    assert run.history[-1].ending is Ending.COMPLETED
    assert_same(run, whole)
    told = why(run.run)
    for part in ("preemption", "ranks ended without an outcome", "hung", "completed", "goodput"):
        assert part in told
    assert status_of(run.run).state == "completed"
    assert "mmpretrain publish" in doctor_run(run.run)
