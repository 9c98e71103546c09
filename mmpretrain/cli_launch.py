"""`mmpretrain submit, status, logs, cancel, why, doctor, top`: a run on a laptop or a cluster, by the same words.

Enter: a run file, or run folders. Leave: jobs, and what is known of them. Refuses as the launcher does.
"""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Roots = Annotated[list[Path] | None, typer.Argument(metavar="FOLDER", help="Runs, or folders that hold them.")]


def add_launch_commands(app: typer.Typer) -> None:
    """Register them at the top level."""
    for command in (submit, status, logs, cancel, why, doctor, top):
        app.command()(command)


def submit(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A run file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="E.g. optimizer.lr=1e-4.")] = None,
    to: Annotated[str, typer.Option(help="local, slurm or kubernetes.")] = "local",
    nodes: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: compute on processors.")] = 0,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="By default one a GPU, or 1.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run and its folder, beside the config's output.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="Cluster file: account, modules, network, time limits.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="key=a,b,c: a run for each; several multiply.")] = None,
    change_config: Annotated[bool, typer.Option("--change-config", help="Go on under another config.")] = False,
    again: Annotated[Path | None, typer.Option(metavar="RUN", help="Queue this run again as it was.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and do nothing.")] = False,
) -> None:
    """Start a run here or queue it on a cluster; it survives preemption, time limits, crashes and hangs."""
    from launcher.again import submit_again
    from launcher.backends.base import read_submission
    from mmpretrain import cli_submit
    from mmpretrain.core.errors import ConfigError

    if again is not None:
        typer.echo(f"submitted {again} again as job {submit_again(again.absolute())}")
        return
    if config is None:
        raise ConfigError("name a run file, e.g. mmpretrain submit configs/demo.yaml --to local")
    wishes = cli_submit.Wishes(
        to, nodes, gpus_per_node, ranks_per_node, time, partition, name, cluster, tuple(sweep or ()), change_config
    )
    jobs = cli_submit.plan_jobs(config, overrides or (), wishes)
    if dry_run:
        typer.echo(cli_submit.dry_run(jobs, wishes), nl=False)
        return
    _, estimate = cli_submit.submit(jobs, wishes)
    typer.echo(estimate)
    for job in jobs:
        queued = read_submission(job.spec.run)
        assert queued is not None, "a backend records what it queues"
        typer.echo(f"submitted {job.spec.run} as job {queued.job}")
    typer.echo(f"watch it:  mmpretrain status {jobs[0].spec.run}   mmpretrain logs -f {jobs[0].spec.run}")


def status(folders: Roots = None) -> None:
    """All runs below folders: state, step, rate, loss, time left, attempts, nodes."""
    from rich.console import Console

    from launcher.status import find_runs, status_of, table_of

    roots = folders or [Path("runs")]
    runs = [status_of(run, roots) for run in find_runs(roots)]
    Console(width=None if Console().is_terminal else 200).print(table_of(runs))


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="One rank's own log.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last.")] = 50,
) -> None:
    """What the job printed."""
    from launcher import logs as reading

    path = reading.log_file(run, rank)
    for line in reading.last_lines(path, lines):
        typer.echo(line)
    if follow:
        for text in reading.follow(run, path):
            typer.echo(text, nl=False)


def cancel(run: Run, now: Annotated[bool, typer.Option("--now", help="Without a last checkpoint.")] = False) -> None:
    """Stop a run: after the step in hand, with a checkpoint, so that it can go on later."""
    from launcher.cancelling import cancel_run

    typer.echo(cancel_run(run, now))


def why(run: Run) -> None:
    """What happened to a run: its attempts, why each ended, lost steps, goodput."""
    from launcher.story import why as tell

    typer.echo(tell(run))


def doctor(run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder.")] = None) -> None:
    """Look for what is wrong: with this machine, or with a run; ends with the next command to type."""
    if run is not None:
        from launcher.diagnosis import doctor_run

        typer.echo(doctor_run(run))
        return
    from launcher.machine import doctor_machine

    for finding in doctor_machine(Path("runs")):
        typer.echo(str(finding))


def top(
    folders: Roots = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    times: Annotated[int | None, typer.Option(min=1, help="Stop after so many looks.")] = None,
) -> None:
    """All runs, live; ends with Ctrl-C."""
    from launcher.top import top as show

    show(folders or [Path("runs")], every, times)
