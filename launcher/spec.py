"""What to run and where: the validated description of a job, and the states a job can be in.

Enter: the command line's wishes and a cluster file. Leave: `JobSpec`, which backends, supervisor and preflight read
from `launch/job.json` of the run folder. Refused: names a scheduler would choke on, times it cannot read.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from mmpretrain.core.config import Config, Rule, load_config
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.run_files import Phase

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,99}")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?")

LAUNCH = "launch"
"""Folder inside the run folder that belongs to the launcher."""


class JobState(StrEnum):
    """Where a job is, whatever the backend calls it."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDING = "ending"
    GONE = "gone"
    """The backend does not know it any more; the run folder tells how it ended."""


class Limits(Config):
    """After how long without a sign of life a phase counts as hung."""

    start_s: float = Field(1800.0, gt=0)
    """From the start of an attempt to its first step: imports, compilation, restoring, the first batch."""
    step_s: float = Field(600.0, gt=0)
    """One step."""
    save_s: float = Field(1800.0, gt=0)
    """One checkpoint."""
    evaluate_s: float = Field(3600.0, gt=0)
    """One evaluation."""

    def of(self, phase: Phase) -> float:
        """Seconds that a phase may take."""
        limits = {"start": self.start_s, "step": self.step_s, "save": self.save_s, "evaluate": self.evaluate_s}
        return limits[phase]


class Kubernetes(Config):
    """What only a TrainJob needs."""

    image: str = "mmpretrain:latest"
    """Container image with this project installed."""
    namespace: str = "default"
    """Namespace of the job."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime of the Kubeflow Trainer."""
    volume_claim: str | None = None
    """PersistentVolumeClaim that holds shards and run folders; null: the runtime mounts one."""
    mount: str = "/data"
    """Where the claim is mounted."""


class Cluster(Config):
    """How jobs are run at one site; kept in a file that `submit --cluster` names."""

    partition: str | None = None
    """Slurm partition; null: the cluster's default."""
    account: str | None = None
    """Whom the scheduler charges."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, e.g. a100."""
    exclude: list[str] = []
    """Nodes never to use; nodes that failed a preflight are added."""
    cpus_per_node: PositiveInt | None = None
    """Processors for one node's ranks and data workers."""
    memory_per_node: str | None = None
    """Host memory as Slurm writes it, e.g. 400G; 0: all of it."""
    sbatch: dict[str, str] = {}
    """Further options of sbatch, name -> value; an empty value is a bare flag."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Of one GPU; a run whose states alone would not fit is refused. null: not known."""
    setup: list[str] = []
    """Shell lines before anything starts, e.g. module load cuda/12.8."""
    environment: dict[str, str] = {}
    """Variables of every process, e.g. NCCL_SOCKET_IFNAME: ib0."""
    container: list[str] = []
    """Command before each node's launcher, e.g. [apptainer, exec, --nv, image.sif]."""
    srun: list[str] = []
    """Further arguments of srun, e.g. --container-image=image.sqsh."""
    signal_lead_s: PositiveInt = 300
    """How long before its time limit a job is told; twice a step and a save should fit in."""
    shutdown_s: PositiveInt = 120
    """How long ranks that were asked to end may take before torchrun kills them."""
    restarts: NonNegativeInt = 10
    """Crashes and hangs after which a run is started again, over all of its life."""
    progress_every_s: float = Field(30.0, gt=0)
    """How often the progress stands anew in the job's comment."""
    limits: Limits = Limits()
    kubernetes: Kubernetes = Kubernetes()


class JobSpec(Config):
    """One job: a program for the ranks of some nodes, and the run folder in which everything about it lies."""

    name: str
    """Of the job; the run folder's if not chosen."""
    run: Path
    """Run folder, absolute and seen by all nodes."""
    program: list[str]
    """What each rank runs, after `torchrun`: -m and a module, or a script, with its arguments."""
    python: str
    """Interpreter."""
    workdir: Path
    """Where the job runs, so that relative paths mean what they meant when it was submitted."""
    code: Path | None = None
    """Folder put before PYTHONPATH: the snapshot of the code; null: what is installed."""
    config_hash: str = ""
    """Of the run config; another config under the same run folder is refused."""
    shards: list[str] = []
    """A few shards that every node must be able to read."""
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    """0: ranks compute on processors."""
    ranks_per_node: PositiveInt
    time_limit_s: PositiveInt | None = None
    """After how long the scheduler ends the job; null: the partition's default."""
    cluster: Cluster = Cluster()

    def broken_rules(self) -> Iterator[Rule]:
        if not _NAME.fullmatch(self.name):
            yield ("name",), f"saw {self.name!r}, expected letters, digits, '.', '_', '=' or '-'; choose another --name"
        lead = self.cluster.signal_lead_s
        if self.time_limit_s is not None and self.time_limit_s <= lead:
            yield (
                ("time_limit_s",),
                f"{self.time_limit_s} s leaves no time before the signal at {lead} s before the end; give more --time "
                f"or lower signal_lead_s in the cluster file",
            )

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def launch_folder(self) -> Path:
        return self.run / LAUNCH


def job_file(run: Path) -> Path:
    """Where a run folder keeps its job."""
    return run / LAUNCH / "job.json"


def read_spec(run: Path) -> JobSpec:
    """The job of a run folder."""
    path = job_file(run)
    if not path.is_file():
        raise ClusterError(f"{run} was not submitted (there is no {path}); name a folder that `mmpretrain submit` made")
    return JobSpec.model_validate_json(path.read_text())


def load_cluster(path: Path | None) -> Cluster:
    """A cluster file, or the defaults."""
    return Cluster() if path is None else load_config(Cluster, path)


def parse_time(text: str) -> int:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ClusterError(f"--time is {text!r}; write minutes, H:MM:SS or D-HH:MM:SS, e.g. 4:00:00")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


def format_time(seconds: int) -> str:
    """As Slurm reads it, in whole minutes rounded up: D-HH:MM:00."""
    minutes = -(-seconds // 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
