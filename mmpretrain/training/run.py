"""One rank of a training run, from a config to an exit code.

Enter: a RunConfig. Leave: a run folder with its outcome, and 0 or 75 (stopped on request with a checkpoint). Every
MMPretrainError leaves outcome.json "fatal" before it goes on to the command line.
"""

import logging

from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ClusterError, MMPretrainError, Preempted
from mmpretrain.training.build import Run, build
from mmpretrain.training.loop import fit
from mmpretrain.training.ranks import join, leave
from mmpretrain.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train, or continue, the run in `config.output`; returns the exit code. Communicates."""
    world, device = join()
    folder = RunFolder(config.output)
    step = 0
    try:
        run = build(config, world, device, folder)
        step = _fit(run)
    except MMPretrainError as error:
        _record_fatal(folder, step, error)
        raise
    except RuntimeError as error:
        if not _peer_is_gone(error):
            raise
        raise ClusterError(f"another rank ended, so this one stops too; its own message says why ({error})") from error
    finally:
        leave()
    return 0 if step >= config.steps else Preempted.exit_code


def _fit(run: Run) -> int:
    step = fit(run.parts)
    run.close("completed" if step >= run.parts.last_step else "preempted", step)
    return step


def _record_fatal(folder: RunFolder, step: int, error: MMPretrainError) -> None:
    """Leave the outcome where a supervisor looks; a folder that cannot be written has no outcome."""
    try:
        folder.write_outcome("fatal", step, str(error))
    except OSError as fault:
        log.warning("outcome.json could not be written: %s", fault)


def _peer_is_gone(error: RuntimeError) -> bool:
    return any(mark in str(error) for mark in ("Connection closed by peer", "Connection reset by peer"))
