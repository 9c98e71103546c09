"""Work on shards as an array of tasks on a cluster: what `data pack` and `data index` do with `--to slurm`.

Enter: the command of one task. Leave: an array of tasks that each do a part, and a job after them where something is
left to join. Refused: what the scheduler would refuse.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.backends.slurm import submit_tasks
from launcher.snapshot import running_source
from launcher.spec import JobSpec, load_cluster
from mmpretrain.core.errors import ConfigError


def submit_array(arguments: Sequence[str], to: str, tasks: int | None, cluster: Path | None, joined: bool) -> str:
    """Queue `mmpretrain data ARGUMENTS --part I/TASKS` for each I; `joined`: and then the command itself."""
    if to != "slurm" or tasks is None:
        raise ConfigError(f"saw --to {to} --tasks {tasks}; tasks go to a cluster: --to slurm --tasks N")
    name = f"data-{arguments[0]}"
    run = Path.cwd() / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    spec = JobSpec(
        name=name,
        run=run,
        program=["-m", "mmpretrain", "data", *arguments],
        python=sys.executable,
        workdir=Path.cwd(),
        code=running_source("").root,
        ranks_per_node=1,
        cluster=load_cluster(cluster),
    )
    return submit_tasks(spec, tasks, joined)
