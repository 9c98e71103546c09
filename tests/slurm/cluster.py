"""A small run on a real Slurm cluster of virtual nodes, submitted as a user would, for tests.

Enter: a folder. Leave: jobs that real sbatch queues and real srun starts. Everything that waits has a deadline.
"""

import subprocess
from pathlib import Path

from launcher import slurm_commands
from launcher.chaos.subject import Subject
from launcher.dev_cluster import URGENT, settings
from launcher.spec import Cluster
from mmpretrain import cli_chaos
from mmpretrain.cli_submit import Wishes
from mmpretrain.core.config import dump_yaml

RUN = ("steps=150", "schedule.kind=cosine", "checkpoint.every=1000", "trace_samples=true")
"""What is other than in `configs/chaos.yaml`."""


def overrides(folder: Path) -> list[str]:
    return [*RUN, f"data.train.sources.main.shards=[{folder}/set/train]"]


def wishes_for(cluster: Cluster, folder: Path, nodes: int) -> Wishes:
    """What a user would type, with a cluster file made of `cluster`."""
    path = folder / "cluster.yaml"
    path.write_text(dump_yaml(cluster))
    return Wishes("slurm", nodes=nodes, time="10", cluster=path)


def submit_run(
    folder: Path, *changes: str, nodes: int = 2, cluster: Cluster | None = None, faulty: bool = False
) -> Subject:
    """Submit the run, through the same functions as the command line."""
    wishes = wishes_for(cluster or settings(), folder, nodes)
    return cli_chaos.submit_run(None, [*overrides(folder), *changes], wishes, folder / "run", faulty)[0]


def preempt(nodes: int, seconds: int) -> None:
    """A job of higher priority that takes all nodes for so long."""
    options = [f"--partition={URGENT}", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
    script = f"#!/bin/bash\nsleep {seconds}\n"
    subprocess.run(["sbatch", *options], input=script, text=True, timeout=30, check=True, stdout=subprocess.DEVNULL)


def comment_of(job: str) -> str:
    return slurm_commands.call("squeue", "--noheader", f"--jobs={job}", "--format=%k").strip()
