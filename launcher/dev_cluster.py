"""A Slurm cluster of virtual nodes on this machine, for as long as a block runs: `slurm/dev_cluster.sh` from Python.

Enter: a folder and a number of nodes. Leave: real daemons, and SLURM_CONF of this process pointing at them. Refused: a
machine without Slurm's daemons.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher import slurm_commands
from launcher.render import template_folder
from launcher.spec import Cluster, Limits
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.run_files import RankProcess

PARTITION, URGENT = "low", "urgent"
"""Where runs go, and whose jobs preempt them."""
_USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    found = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    return "" if found else "there is no slurmctld here (Debian and Ubuntu: apt install slurm-wlm)"


def settings(**changes: object) -> Cluster:
    """A cluster file for such a cluster: signals and limits that suit runs of a minute."""
    return Cluster(
        partition=PARTITION,
        cpus_per_node=1,
        signal_lead_s=60,
        shutdown_s=15,
        progress_every_s=2,
        limits=Limits(start_s=400, step_s=20, save_s=30, evaluate_s=60),
        environment={"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    ).model_copy(update=changes)


@dataclass(frozen=True)
class DevCluster:
    """A cluster that is up, and what only its owner may do to it."""

    folder: Path

    @property
    def nodes(self) -> int:
        """Those whose daemon was not killed."""
        return len(list(self.folder.glob("slurmd-*.pid")))

    def send_user_signal(self, wanted: bool) -> None:
        """Whether preempted jobs are sent the signal that they asked for."""
        path = self.folder / "slurm.conf"
        lines = path.read_text().splitlines()
        line = _USER_SIGNAL if wanted else f"# {_USER_SIGNAL}"
        path.write_text("".join(f"{line if _USER_SIGNAL in one else one}\n" for one in lines))
        slurm_commands.call("scontrol", "reconfigure")

    def kill_node(self, rank: RankProcess) -> None:
        """Everything that runs on the node of a rank, its daemon included, at once."""
        pid_file = self.folder / f"slurmd-{rank.node}.pid"
        chain = [psutil.Process(rank.pid), *psutil.Process(rank.pid).parents()]
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        for process in chain:
            if process.pid not in (1, os.getpid()):
                process.kill()
        pid_file.unlink()


@contextmanager
def started(folder: Path, nodes: int) -> Iterator[DevCluster]:
    """A cluster while the block runs."""
    if reason := missing():
        raise ClusterError(f"no cluster can be started: {reason}")
    before = os.environ.get("SLURM_CONF")
    _script("start", str(folder), str(nodes))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield DevCluster(folder)
    finally:
        _script("stop", str(folder))
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


def in_use() -> DevCluster | None:
    """The cluster that SLURM_CONF names, where `slurm/dev_cluster.sh` made it."""
    folder = Path(os.environ.get("SLURM_CONF", "")).parent
    ours = (folder / "slurmctld.pid").is_file() and any(folder.glob("slurmd-*.pid"))
    return DevCluster(folder) if ours else None


def _script(*arguments: str) -> None:
    script = template_folder() / "dev_cluster.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ClusterError(done.stderr.strip().removeprefix("error: "))
