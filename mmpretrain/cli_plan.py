"""`mmpretrain plan`: what a run will take, before a machine is spent on it.

Enter: a run file, overrides, a number of GPUs and their kind. Leave: tables or JSON on stdout. Refuses what `train`
would refuse of the config, and a global batch that the GPUs cannot share.
"""

from pathlib import Path
from typing import Annotated

import typer

_NARROWEST = 110


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/clip-vit-l14.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="E.g. zero_stage=2.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many, in nodes of eight.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures for programs, in bytes and seconds.")] = False,
) -> None:
    """Forecast memory, step time, communication, data and GPU-hours of a run, without data or GPUs."""
    from mmpretrain.config import load_run_config

    run_config = load_run_config(config, overrides or ())
    from mmpretrain.planning.machines import machine_named
    from mmpretrain.planning.plan import make_plan  # after the config, whose faults then come sooner

    made = make_plan(run_config, gpus, machine_named(gpu))
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(made), indent=2))
        return
    from rich.console import Console

    from mmpretrain.planning.tables import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _NARROWEST
    for part in show(made):
        console.print(part, markup=False)
        console.print()
