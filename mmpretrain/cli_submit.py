"""What `mmpretrain submit` does before anything is queued: a run config and wishes become jobs.

Enter: a run file, overrides, a backend's name, resources. Leave: JobSpecs with the code and config of each; then their
jobs. Refused, in this order and before anything is written: faulty configs, batches that do not divide, unreadable
shards, states larger than a GPU, run folders in use, and what the scheduler would refuse.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import snapshot
from launcher.backends.base import Backend, backend_named
from launcher.snapshot import Source
from launcher.spec import Cluster, JobSpec, load_cluster, parse_time
from mmpretrain.config import RunConfig, load_run_config
from mmpretrain.core.config import config_hash, dump_yaml, validate
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.yaml_source import read_text

_SHARDS_TRIED = 3


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the config."""

    to: str
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    name: str | None = None
    cluster: Path | None = None
    sweep: tuple[str, ...] = ()
    change_config: bool = False


@dataclass(frozen=True)
class Job:
    """One run that could be submitted."""

    spec: JobSpec
    config: RunConfig

    @property
    def source(self) -> Source:
        return snapshot.running_source(dump_yaml(self.config))


def plan_jobs(path: Path, overrides: Sequence[str], wishes: Wishes) -> list[Job]:
    """One job, or one for each point of the sweep."""
    points = sweep_points(wishes.sweep)
    return [_plan(path, [*overrides, *point], wishes, _point_name(point)) for point in points]


def sweep_points(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """`key=a,b` times `other=c,d` as overrides: every combination; one empty point without a sweep."""
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise ConfigError(f"--sweep is {axis!r}; write key=value,value, e.g. optimizer.lr=1e-4,3e-4")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def _point_name(point: Sequence[str]) -> str | None:
    """lr=1e-4,seed=1 as the name of a folder."""
    parts = [override.partition("=") for override in point]
    return "_".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in parts) or None


def _plan(path: Path, overrides: Sequence[str], wishes: Wishes, point: str | None) -> Job:
    config = load_run_config(path, overrides)
    run = _run_folder(config.output, wishes.name, point)
    config = config.model_copy(update={"output": run})
    digest = config_hash(config, exclude=("output",))
    ranks = wishes.ranks_per_node or max(1, wishes.gpus_per_node)
    spec = _validated(
        JobSpec.model_construct(
            name=wishes.name if point is None and wishes.name else run.name,
            run=run,
            program=["-m", "mmpretrain.train", str(snapshot.config_file(run, digest))],
            python=sys.executable,
            workdir=Path.cwd(),
            code=snapshot.code_folder(run, snapshot.running_source("")),
            config_hash=digest,
            shards=_shard_names(config),
            nodes=wishes.nodes,
            gpus_per_node=wishes.gpus_per_node,
            ranks_per_node=ranks,
            time_limit_s=None if wishes.time is None else parse_time(wishes.time),
            cluster=cluster_of(wishes),
        )
    )
    BatchPlan(config.global_batch_size, config.micro_batch_size, World(0, spec.ranks))
    return Job(spec, config)


def _run_folder(output: Path, name: str | None, point: str | None) -> Path:
    """The config's output, under another name where one is given; a sweep's runs lie inside."""
    folder = Path.cwd() / output
    folder = folder if name is None else folder.with_name(name)
    return folder if point is None else folder / point


def _validated(spec: JobSpec) -> JobSpec:
    """The same spec, or every fault of it in the words of the config reader."""
    return validate(JobSpec, read_text(dump_yaml(spec), "command line"))


def _shard_names(config: RunConfig) -> list[str]:
    """Those of the first shards that are there; what is missing is refused when shards are opened."""
    from data_pipeline.shards import resolve_shards
    from data_pipeline.stores import scheme_of
    from mmpretrain.core.errors import DataError

    local = [
        patterns
        for source in config.data.train.sources.values()
        if (patterns := [pattern for pattern in source.shards if scheme_of(pattern) is None])
    ]
    try:
        shards = [shard for patterns in local for shard in resolve_shards(patterns)[:1]]
    except DataError:
        return []
    return [str(shard.resolve()) for shard in shards[:_SHARDS_TRIED] if isinstance(shard, Path)]


def submit(jobs: Sequence[Job], wishes: Wishes) -> tuple[str, str]:
    """Check, write and queue; the job's number, and what a rank's states will take."""
    backend = backend_named(wishes.to)
    _check_places(jobs, wishes)
    _open_shards(jobs)
    estimate = _check_memory(jobs)
    for job in jobs[:1]:
        backend.check(job.spec)
    with snapshot.written([job.spec for job in jobs], [job.source for job in jobs]):
        number = backend.submit([job.spec for job in jobs])
    return number, estimate


def dry_run(jobs: Sequence[Job], wishes: Wishes) -> str:
    """The text that would run."""
    backend: Backend = backend_named(wishes.to)
    return backend.render([job.spec for job in jobs])


def _check_places(jobs: Sequence[Job], wishes: Wishes) -> None:
    folders = [job.spec.run for job in jobs]
    if len(set(folders)) != len(folders):
        raise ConfigError("two points of the sweep have the same name; sweep each value once")
    for job in jobs:
        snapshot.refuse_other_run(job.spec, wishes.change_config)


def _open_shards(jobs: Sequence[Job]) -> None:
    """Every shard is there, is a tar with the members that the towers need, and is the one that was indexed."""
    from data_pipeline.reader import open_sources

    seen: set[tuple[tuple[str, ...], ...]] = set()
    for job in jobs:
        sources = job.config.data.train.sources
        key = tuple(source.shards for source in sources.values())
        if key not in seen:
            seen.add(key)
            open_sources({name: source.shards for name, source in sources.items()}, cache=job.config.data.cache)


def _check_memory(jobs: Sequence[Job]) -> str:
    """An estimate in words; refuses what cannot fit."""
    from mmpretrain.planning.memory import GIB
    from mmpretrain.planning.plan import state_estimate

    job = jobs[0]
    parameters, memory = state_estimate(job.config, job.spec.ranks)
    estimate = (
        f"{parameters.total / 1e6:.1f} M parameters; each rank takes {memory.total / GIB:.2f} GiB, of which "
        f"{memory.buffers / GIB:.2f} are DeepSpeed's buffers"
    )
    there = job.spec.cluster.gpu_memory_gib
    if there is not None and memory.total > there * GIB:
        raise ClusterError(
            f"{estimate}, more than the {there:g} GiB of a GPU, before any activation; use more ranks, zero_stage=3 or "
            f"engine.offload=optimizer"
        )
    return f"{estimate}; activations come on top (mmpretrain plan tells)"


def cluster_of(wishes: Wishes) -> Cluster:
    """The cluster file with what the command line changes."""
    cluster = load_cluster(wishes.cluster)
    return cluster if wishes.partition is None else cluster.model_copy(update={"partition": wishes.partition})
