"""`mmpretrain finetune`: train on from the weights of another model.

Enter: a run file with a `finetune` part, what to start from. Leave: a run folder like any other. Refuses what `train`
refuses, and weights that fit nowhere.
"""

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, e.g. configs/finetune-classify.yaml.")],
    parent: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="A run folder, a checkpoint, a published folder, or a folder or hub name of transformers.",
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="E.g. finetune.train=2.")] = None,
) -> None:
    """Fine-tune in this process, or as one rank under torchrun; continues where the output folder's run stopped."""
    from mmpretrain.config import load_run_config

    run_config = load_run_config(config, [*(overrides or ()), f"finetune.parent={parent}"])
    from mmpretrain.training.ranks import choose_accelerator

    choose_accelerator()
    from mmpretrain.training.run import train

    raise typer.Exit(train(run_config))
