"""`mmpretrain wandb`: what W&B's own command cannot do for a run folder.

Enter: a run folder. Leave: one W&B run. Refuses a folder without metrics.
"""

from pathlib import Path
from typing import Annotated

import typer

wandb_commands = typer.Typer(help="Bring runs to Weights & Biases.", no_args_is_help=True)


@wandb_commands.callback()
def wandb_group() -> None:
    """Bring runs to Weights & Biases."""


@wandb_commands.command()
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    project: Annotated[str | None, typer.Option(help="W&B project; that of the run's config if left out.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only record it in RUN/wandb.")] = False,
) -> None:
    """Replay metrics.jsonl into one clean W&B run, however many attempts and offline pieces there were."""
    from mmpretrain.tracking.wandb_replay import replay

    done = replay(run, project, offline)
    typer.echo(f"{done.rows} rows up to step {done.last_step} {'sent to W&B' if done.online else 'recorded'}")
    if not done.online:
        typer.echo(f"  in {done.folder}; `wandb sync {done.folder}` uploads it")


@wandb_commands.command()
def workspace(
    entity: Annotated[str, typer.Option(help="User or team.")],
    project: Annotated[str, typer.Option(help="The project whose runs it shows.")] = "mmpretrain",
    spec: Annotated[Path | None, typer.Option(help="Sections and panels, as configs/tracking has.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print it as JSON and send nothing.")] = False,
) -> None:
    """Save a workspace of panels over the metrics of runs, the same for a whole team."""
    from mmpretrain.config import configs_folder
    from mmpretrain.tracking.wandb_workspace import build, save

    made = build(spec or configs_folder() / "tracking" / "wandb-workspace.yaml", entity, project)
    typer.echo(made._to_model().model_dump_json(by_alias=True, indent=2) if dry_run else save(made))
