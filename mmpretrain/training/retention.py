"""Which checkpoints stay and which are deleted, by the rules of the config.

Enter: the folder of checkpoints, right after one became valid. Leave: those that a rule keeps, that one among them.
What cannot be deleted stays, with a warning, and is tried again after the next save.
"""

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from mmpretrain.config_checkpoint import BestConfig, CheckpointConfig
from mmpretrain.core.run_files import saved_checkpoints

log = logging.getLogger(__name__)


def retain(
    folder: Path, newest: int, rules: CheckpointConfig, figures: Mapping[int, float], in_use: Collection[int] = ()
) -> None:
    """Delete checkpoints that no rule keeps, and what killed saves left. One rank calls it, while none is written.

    `newest` is the step of the checkpoint that has just become valid. Those of later steps are damaged ones that the
    run passed over and will write again: they stay until then, and count for nothing. `figures` are those of
    `keep_best` by step; `in_use` are steps whose checkpoints are being read.
    """
    steps = [step for step in map(step_of, saved_checkpoints(folder)) if step <= newest]
    kept = {*steps[-rules.keep_last :], *in_use}
    if rules.keep_every is not None:
        kept.update(step for step in steps if step % rules.keep_every == 0)
    if rules.keep_best is not None:
        kept.update(_best(steps, rules.keep_best, figures))
    for step in steps:
        if step not in kept:
            _set_aside(folder / name_of(step))
    for rest in (*folder.glob(".step-*.removed"), *folder.glob(".step-*.partial")):
        _delete(rest)


def _best(steps: Collection[int], rule: BestConfig, figures: Mapping[int, float]) -> list[int]:
    """Of equal ones the later."""
    sign = 1 if rule.mode == "max" else -1
    measured = sorted((sign * figures[step], step) for step in steps if step in figures)
    return [step for _, step in measured[-rule.count :]]


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def name_of(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def _set_aside(path: Path) -> None:
    """At once, so that a deletion that is cut off leaves no damaged checkpoint."""
    try:
        path.rename(path.with_name(f".{path.name}.removed"))
    except OSError as fault:
        log.warning("checkpoint %s is no longer kept and cannot be removed: %s", path, fault)


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as fault:
        log.warning("%s is left of a checkpoint and cannot be deleted: %s", path, fault)
