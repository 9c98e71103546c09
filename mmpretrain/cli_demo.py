"""`mmpretrain demo` and `mmpretrain gate`: complete runs on the synthetic set, from nothing to figures."""

from pathlib import Path
from typing import Annotated

import typer

demo_commands = typer.Typer()

Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where everything is written.")]


@demo_commands.command()
def demo(folder: Folder = Path("runs/demo")) -> None:
    """Make shards, pretrain on two ranks, evaluate, report and publish, in minutes on a CPU."""
    from mmpretrain.demo import demo as run_demo

    run_demo(folder)


@demo_commands.command()
def gate(folder: Folder = Path("runs/gate")) -> None:
    """Train three seeds on four modalities, and show that each modality is learned and used."""
    from mmpretrain.gate import gate as run_gate

    run_gate(folder)
