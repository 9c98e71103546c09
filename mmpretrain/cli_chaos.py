"""`mmpretrain chaos`: break a run in every way there is, and see that it ends as if nothing had happened.

Enter: a backend, minutes, and a run file or none. Leave: a table of what happened, a comparison with a run to which
nothing happened, and the run's own story; exit 4 where they differ. Refused: a folder that holds something.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.chaos.drill import Drill
    from launcher.chaos.faults import Site
    from launcher.chaos.subject import Subject
    from launcher.dev_cluster import DevCluster
    from mmpretrain.cli_submit import Wishes

SAMPLES, IMAGE_SIZE, SAMPLES_PER_SHARD = 96, 24, 32
"""Of the set that is drawn where no run file is named."""
_WIDTH = 160
"""Of a table that is written to a file."""
_TAIL_MINUTES = 30
"""A job may take so much longer than the drill: the fault in hand, and the end."""


def chaos(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [key=value]...", help="A run file, else a tiny run; changes of it."),
    ] = None,
    to: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    minutes: Annotated[float, typer.Option(min=0, help="No further fault is begun after so long.")] = 10.0,
    folder: Annotated[Path, typer.Option(help="New folder for everything.")] = Path("runs/chaos"),
    nodes: Annotated[int | None, typer.Option(min=1, help="Of the run; by default 2 on a cluster.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: compute on processors.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="By default one a GPU; else 2 ranks in all.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition of the run.")] = None,
    urgent: Annotated[str | None, typer.Option(help="Slurm partition whose jobs preempt it.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="Cluster file, as for submit.")] = None,
    faults: Annotated[str | None, typer.Option(help="Names, e.g. rank-killed,hang; by default all.")] = None,
    hang_after: Annotated[float, typer.Option(min=5, help="Seconds without a step that count as a hang.")] = 30.0,
    compare: Annotated[bool, typer.Option(help="Train the same without faults, and compare.")] = True,
) -> None:
    """Break a run on your cluster, or on one made for it, before the big run: does it come back, and unchanged?"""
    from rich.console import Console

    from launcher.chaos.drill import Drill, chosen, ended_afterwards
    from launcher.chaos.faults import faults_at
    from mmpretrain.cli_submit import Wishes
    from mmpretrain.core.errors import ClusterError, ConfigError

    if to not in ("local", "slurm"):
        raise ConfigError(f"--to is {to!r}; a drill runs on local or slurm")
    wanted = chosen(faults_at(to), faults)
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ClusterError(f"{folder} holds something already; remove it, or give another --folder")
    config, overrides = _split(arguments or ())
    nodes = nodes or (1 if to == "local" else 2)
    ranks = ranks_per_node or gpus_per_node or max(1, 2 // nodes)
    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False)
    with _site(to, folder, nodes, urgent) as site:
        path = _cluster_file(folder, cluster, site.own, hang_after)
        time = None if to == "local" else f"{minutes + _TAIL_MINUTES:.0f}"
        wishes = Wishes(to, nodes, gpus_per_node, ranks, time, partition, cluster=path)
        overrides = [*_run(config, folder), *overrides]
        subject, interval = submit_run(config, overrides, wishes, folder / "run", faulty=True)
        drill = Drill(subject, site, interval + 5, lambda row: console.print(*row.cells, sep=" | ", soft_wrap=True))
        with ended_afterwards(subject):
            drill.go(wanted, minutes)
            drill.end()
        whole = submit_run(config, overrides, wishes, folder / "whole")[0] if compare else None
        equal = _conclude(console, drill, whole)
    raise typer.Exit(0 if equal else ClusterError.exit_code)


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run file, where one is named, and the overrides."""
    from mmpretrain.core.errors import ConfigError

    files = [one for one in arguments if "=" not in one]
    if len(files) > 1:
        raise ConfigError(f"saw {len(files)} run files ({', '.join(files)}); name one, or none for a tiny run")
    return (Path(files[0]) if files else None), [one for one in arguments if "=" in one]


def submit_run(
    config: Path | None, overrides: Sequence[str], wishes: "Wishes", run: Path, faulty: bool = False
) -> "tuple[Subject, int]":
    """Submit a run as `mmpretrain submit` does, and the steps between its checkpoints; `faulty`: by the program that
    can be broken from outside."""
    from launcher.chaos.subject import DEADLINE_S, Subject
    from mmpretrain.cli_submit import Job, plan_jobs, submit
    from mmpretrain.config import configs_folder

    (job,) = plan_jobs(config or configs_folder() / "chaos.yaml", [*overrides, f"output={run}"], wishes)
    if faulty:
        *_, file = job.spec.program
        job = Job(job.spec.model_copy(update={"program": ["-m", "mmpretrain.faulty_train", file]}), job.config)
    submit([job], wishes)
    deadline_s = max(DEADLINE_S, job.spec.cluster.limits.start_s + job.spec.cluster.limits.save_s)
    return Subject(job.spec.run, deadline_s), job.config.checkpoint.every


def _run(config: Path | None, folder: Path) -> list[str]:
    """Overrides that every run of a drill needs; without a run file its shards are drawn first."""
    if config is not None:
        return ["trace_samples=true"]
    from data_pipeline.make import make

    make(folder / "set", samples=SAMPLES, image_size=IMAGE_SIZE, samples_per_shard=SAMPLES_PER_SHARD, workers=1)
    return ["trace_samples=true", f"data.train.sources.main.shards=[{folder}/set/train]"]


@contextmanager
def _site(to: str, folder: Path, nodes: int, urgent: str | None) -> "Iterator[Site]":
    """This machine, the cluster it can submit to, or else one made for the drill."""
    from launcher import dev_cluster, slurm_commands
    from launcher.chaos.faults import Site
    from mmpretrain.core.errors import ClusterError

    if to == "local":
        yield Site(to)
        return
    try:
        slurm_commands.call("sinfo", "--noheader")
    except ClusterError:
        with dev_cluster.started(folder / "cluster", nodes + 1) as own:
            yield Site(to, nodes, own, urgent or dev_cluster.URGENT)
        return
    there = dev_cluster.in_use()
    yield Site(to, nodes, there, urgent or (None if there is None else dev_cluster.URGENT))


def _cluster_file(folder: Path, given: Path | None, own: "DevCluster | None", hang_after: float) -> Path:
    """The user's cluster file, or one for a small run on this machine, with limits that suit a drill."""
    from launcher.dev_cluster import settings
    from launcher.spec import load_cluster
    from mmpretrain.core.config import dump_yaml

    cluster = load_cluster(given) if given is not None or own is None else settings()
    limits = cluster.limits.model_copy(update={"step_s": hang_after})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cluster.yaml"
    path.write_text(dump_yaml(cluster.model_copy(update={"limits": limits, "restarts": 100})))
    return path


def _conclude(console: "Console", drill: "Drill", whole: "Subject | None") -> bool:
    """Print everything; whether the run equals one to which nothing was done."""
    from launcher.chaos.comparison import compare as compare_runs
    from launcher.chaos.drill import train_whole
    from launcher.diagnosis import doctor_run
    from launcher.status import status_of, table_of
    from launcher.story import why

    run = drill.subject.run
    console.print(drill.table())
    equal = True
    if whole is not None:
        train_whole(whole, max(int(str(step)) for step in drill.subject.losses()))
        compared = compare_runs(drill.subject, whole, drill.skipped)
        console.print(str(compared), soft_wrap=True)
        equal = compared.is_equal
    for told in (why(run), doctor_run(run), table_of([status_of(run)])):
        console.print()
        console.print(told, soft_wrap=isinstance(told, str))
    return equal
