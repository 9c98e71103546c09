"""`mmpretrain config`: look at a run file before a machine is spent on it.

Enter: run files and overrides. Leave: YAML, a verdict or a JSON schema on stdout. Refuses what `train` would refuse.
"""

from pathlib import Path
from typing import Annotated

import typer

from mmpretrain.core.errors import ConfigError

config_commands = typer.Typer(help="Show, check and describe run configs.", no_args_is_help=True)


@config_commands.command()
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
) -> None:
    """Print the resolved config: defaults, files and overrides joined, every key written out."""
    from mmpretrain.config import load_run_config
    from mmpretrain.core.config import dump_yaml

    typer.echo(dump_yaml(load_run_config(config, overrides or ())), nl=False)


@config_commands.command()
def check(
    arguments: Annotated[list[str], typer.Argument(metavar="CONFIG|key=value", help="Run files, overrides.")],
) -> None:
    """Print every fault of the run files, or ok for each; overrides apply to all of them."""
    from mmpretrain.config import load_run_config

    overrides = [argument for argument in arguments if "=" in argument]
    faults: list[str] = []
    for path in (Path(argument) for argument in arguments if "=" not in argument):
        try:
            load_run_config(path, overrides)
        except ConfigError as error:
            faults.append(str(error))
        else:
            typer.echo(f"{path}: ok")
    if faults:
        raise ConfigError("\n".join(faults))


@config_commands.command()
def schema() -> None:
    """Print the JSON schema of run configs, for editors."""
    import json

    from mmpretrain.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
