"""A real Slurm cluster of virtual nodes for tests, and a small run on it, driven as a user would.

Enter: a folder. Leave: jobs that real sbatch queues and real srun starts. Everything that waits has a deadline.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher import slurm_commands, snapshot
from launcher.backends.base import standing
from launcher.history import Attempt, History
from launcher.spec import Cluster, JobState, Limits
from mmpretrain.cli_submit import Job, Wishes, plan_jobs, submit
from mmpretrain.core import run_files
from mmpretrain.core.config import dump_yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "dev_cluster.sh"
FAULTY = Path(__file__).with_name("faulty_train.py")
DEADLINE_S = 600.0
CONFIG = """
output: {folder}/run
steps: 150
precision: fp32
zero_stage: 2
global_batch_size: 24
micro_batch_size: 12
trace_samples: true
checkpoint: {{every: 1000, keep_last: 3}}
model:
  embed_dim: 32
  towers:
    image: {{kind: native, stem: {{kind: patches, image_size: 16, patch_size: 8}}, width: 32, depth: 2, heads: 2}}
    text: {{kind: native, stem: {{kind: embeddings, context_length: 12}}, width: 32, depth: 2, heads: 2}}
objectives:
  itc: {{kind: infonce}}
data:
  train: {{sources: {{main: {{shards: [{folder}/set/train]}}}}}}
  tokenizer: {{train_vocab_size: 300}}
  workers: 0
schedule: {{warmup: 5}}
tracking: {{log_every: 50}}
"""


def can_run() -> str:
    """Why no cluster can be started here; empty where one can."""
    found = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    return "" if found else "there is no slurmctld here (Debian and Ubuntu: apt install slurm-wlm)"


@contextmanager
def started(folder: Path, nodes: int, user_signal: bool = True) -> Iterator[None]:
    """A cluster while the block runs; SLURM_CONF of this process points at it."""
    before = os.environ.get("SLURM_CONF")
    environment = {**os.environ, "MMPRETRAIN_CLUSTER_USER_SIGNAL": "yes" if user_signal else "no"}
    subprocess.run([SCRIPT, "start", folder, str(nodes)], env=environment, timeout=60, check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        subprocess.run([SCRIPT, "stop", folder], timeout=120, check=True)
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> float:
    """Poll until `condition` holds and return the seconds it took; fails after the deadline, naming what did not."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, f"{what} did not happen within {deadline_s:g} s"
        time.sleep(0.1)
    return time.monotonic() - began


@dataclass(frozen=True)
class SlurmRun:
    """One submitted run."""

    run: Path
    job: str

    @property
    def history(self) -> list[Attempt]:
        return History(self.run).read()

    @property
    def history_with_current(self) -> list[Attempt]:
        current = History(self.run).current()
        return [*self.history, *([] if current is None else [current])]

    @property
    def step(self) -> int:
        """The newest of this attempt; 0 while it starts."""
        beat, current = run_files.read_heartbeat(self.run), History(self.run).current()
        fresh = beat is not None and current is not None and beat.time > current.began and beat.phase != "start"
        return run_files.last_step(self.run) if fresh else 0

    @property
    def log(self) -> str:
        path = self.run / "logs" / "job.log"
        return path.read_text() if path.is_file() else ""

    def wait_for_step(self, step: int, attempt: int = 0) -> float:
        def reached() -> bool:
            current = History(self.run).current()
            assert current is not None or standing(self.run).state is not JobState.GONE, f"the job ended:\n{self.log}"
            return current is not None and current.attempt >= attempt and self.step >= step

        return self._wait(reached, f"step {step} of attempt {attempt}")

    def wait_for_end(self) -> None:
        self._wait(lambda: standing(self.run).state is JobState.GONE, "the end of the job")

    def _wait(self, condition: Callable[[], bool], what: str) -> float:
        try:
            return wait_until(condition, what)
        except AssertionError as fault:
            raise AssertionError(f"{fault}\n{self.log[-4000:]}") from None

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(run_files.read_ranks(self.run)[rank].pid, number)

    def rows(self, name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]

    def losses(self) -> dict[object, object]:
        """Step -> loss of the newest attempt that reached it."""
        return {row["step"]: row["train/loss"] for row in self.rows("metrics.jsonl") if "train/loss" in row}


def wishes_for(cluster: Cluster, folder: Path, nodes: int) -> Wishes:
    """What a user would type, with a cluster file made of `cluster`."""
    path = folder / "cluster.yaml"
    path.write_text(dump_yaml(cluster))
    return Wishes("slurm", nodes=nodes, time="10", cluster=path)


def small_cluster(**changes: object) -> Cluster:
    """Signals and limits that suit runs of a minute."""
    limits = Limits(start_s=400, step_s=20, save_s=30, evaluate_s=60)
    return Cluster(
        partition="low",
        cpus_per_node=1,
        signal_lead_s=60,
        shutdown_s=15,
        progress_every_s=2,
        limits=limits,
        environment={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    ).model_copy(update=changes)


def submit_run(
    folder: Path, *overrides: str, nodes: int = 2, cluster: Cluster | None = None, faulty: bool = False
) -> SlurmRun:
    """Submit `run.yaml` of a folder, through the same functions as the command line."""
    wishes = wishes_for(cluster or small_cluster(), folder, nodes)
    jobs = plan_jobs(folder / "run.yaml", overrides, wishes)
    number, _ = submit([_faulty(job) for job in jobs] if faulty else jobs, wishes)
    return SlurmRun(jobs[0].spec.run, number)


def _faulty(job: Job) -> Job:
    config = snapshot.config_file(job.spec.run, job.spec.config_hash)
    return Job(job.spec.model_copy(update={"program": [str(FAULTY), str(config)]}), job.config)


def preempt(nodes: int, seconds: int) -> None:
    """A job of higher priority that takes all nodes for so long."""
    options = ["--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
    script = f"#!/bin/bash\nsleep {seconds}\n"
    subprocess.run(["sbatch", *options], input=script, text=True, timeout=30, check=True, stdout=subprocess.DEVNULL)


def comment_of(job: str) -> str:
    return slurm_commands.call("squeue", "--noheader", f"--jobs={job}", "--format=%k").strip()
