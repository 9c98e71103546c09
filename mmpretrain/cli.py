"""The command line: thin commands that check their arguments and call one function, imported inside them.

Enter: arguments. Leave: an exit code. Every `MMPretrainError` becomes `error: ...` on stderr and its exit code.
Heavy libraries are imported inside the commands alone, so that `mmpretrain --help` answers at once.
"""

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmpretrain.cli_chaos import chaos
from mmpretrain.cli_config import config_commands
from mmpretrain.cli_dashboard import dashboard
from mmpretrain.cli_data import data_commands
from mmpretrain.cli_demo import demo_commands
from mmpretrain.cli_finetune import finetune
from mmpretrain.cli_launch import add_launch_commands
from mmpretrain.cli_plan import plan
from mmpretrain.cli_use import add_use_commands
from mmpretrain.cli_wandb import wandb_commands
from mmpretrain.core.errors import MMPretrainError
from mmpretrain.core.ranks import world_from_env

app = typer.Typer(
    help="Pretrain multimodal transformers from WebDataset shards, exactly and at scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(demo_commands)
app.add_typer(data_commands, name="data")
app.add_typer(config_commands, name="config")
app.command()(finetune)
app.add_typer(wandb_commands, name="wandb")
app.command()(dashboard)
app.command()(chaos)
app.command()(plan)
add_launch_commands(app)

Average = Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights, which ema keeps.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="E.g. optimizer.lr=1e-4.")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank under torchrun; continues where the output folder's run stopped."""
    from mmpretrain.config import load_run_config

    run_config = load_run_config(config, overrides or ())
    _choose_accelerator()
    from mmpretrain.training.run import train as run_training  # after the config, whose faults then come sooner

    raise typer.Exit(run_training(run_config))


@app.command("eval")
def eval_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or one of its checkpoints.")],
    overrides: Overrides = None,
    ema: Average = False,
) -> None:
    """Evaluate by the tasks of the run's config, which overrides change; alone or under torchrun."""
    _choose_accelerator()
    from mmpretrain.training.evaluate import evaluate_trained

    trained, figures = evaluate_trained(checkpoint, tuple(overrides or ()), ema)
    if world_from_env().is_main:
        typer.echo(f"step {trained.position.step}")
        width = max(map(len, figures), default=0)
        for name, value in sorted(figures.items()):
            typer.echo(f"{name:<{width}} {value:.4f}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    to_dir: Annotated[Path, typer.Option(help="New folder for the model.")],
    to_hub: Annotated[str | None, typer.Option(help="Then upload it to this repository, e.g. me/model.")] = None,
    license_id: Annotated[str, typer.Option("--license", help="License as the hub names it.")] = "other",
    name: Annotated[str | None, typer.Option(help="The model's name; the folder's if left out.")] = None,
    ema: Average = False,
) -> None:
    """Write the model, its exports and its card, and compare them in a fresh process before they count."""
    _choose_accelerator()
    from mmpretrain.publishing.hub import upload
    from mmpretrain.training.publish import publish_run

    published = publish_run(run, to_dir, license_id, name, ema)
    typer.echo(f"published {published.folder}")
    for layout, reasons in sorted(published.obstacles.items()):
        typer.echo(f"  not as {layout}: {'; '.join(reasons)}" if reasons else f"  as {layout}")
    if to_hub is not None:
        typer.echo(upload(published.folder, to_hub))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; else report.html in RUN.")] = None,
) -> None:
    """Write one self-contained page of plots, figures and sample retrievals."""
    from mmpretrain.tracking.report import write_report

    typer.echo(write_report(run, out))


add_use_commands(app)


def _choose_accelerator() -> None:
    from mmpretrain.training.ranks import choose_accelerator  # before what imports DeepSpeed

    choose_accelerator()


_COLLECTION = (50_000, 10, 10)
"""Objects made before garbage is looked for. Imports make a million that stay; with Python's own 700 a sixth of a run's
start went into looking through them."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    gc.set_threshold(*_COLLECTION)
    atexit.register(gc.freeze)  # or Python looks through all of it once more before it ends, for a second
    try:
        app(arguments)
    except MMPretrainError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _report(error: MMPretrainError) -> int:
    """Print the message where a person looks for it and return the exit code."""
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    prefix = "error: " if size == "1" else f"[rank {rank}] error: "
    lines = str(error).splitlines() or [type(error).__name__]
    sys.stderr.write("".join(f"{line}\n" if line.startswith(" ") else f"{prefix}{line}\n" for line in lines))
    return error.exit_code
