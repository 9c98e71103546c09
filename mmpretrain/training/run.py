"""One rank of a training run, from a config to an exit code.

Enter: a RunConfig. Leave: a run folder with its outcome, and 0 or 75 (stopped on request with a checkpoint). Every
MMPretrainError leaves outcome.json "fatal" before it goes on to the command line.
"""

import errno
import logging

from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ClusterError, DivergenceError, MMPretrainError, Preempted
from mmpretrain.core.ranks import world_from_env
from mmpretrain.training.build import Run, build, go_back, parts_from
from mmpretrain.training.loop import fit
from mmpretrain.training.ranks import join, leave
from mmpretrain.training.requests import Requests, die_with_parent
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.run_lock import RunTaken
from mmpretrain.training.spikes import RollBack

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(config: RunConfig) -> int:
    """Train, or continue, the run in `config.output`; returns the exit code. Communicates."""
    die_with_parent()
    folder = RunFolder(config.output)
    requests = Requests(folder if world_from_env().is_main else None)
    requests.install()
    world, device = join()
    run: Run | None = None
    try:
        run = build(config, world, device, folder, requests)
        return _fit(run, requests)
    except MMPretrainError as error:
        _end_fatally(folder, run, error)
        raise
    except OSError as fault:
        if fault.errno not in _NO_ROOM:
            raise
        refusal = ClusterError(
            f"the run folder {folder.path} cannot be written ({fault.strerror}); free space or quota there, then "
            f"start the run again: it continues from its newest checkpoint"
        )
        _end_fatally(folder, run, refusal)
        raise refusal from fault
    except RuntimeError as fault:
        lost = _lost_process(fault)
        if lost is None:
            raise
        raise lost from fault
    finally:
        if run is not None:
            run.trackers.close("crashed")  # nothing is left to close after any other end
        leave()


def _fit(run: Run, requests: Requests) -> int:
    step = _fit_past_spikes(run)
    completed = step >= run.config.steps
    message = f"{step} of {run.config.steps} steps done"
    if completed:
        run.close("completed", message)
    else:
        run.close("preempted", message, requests.stop_reason or "a signal to another rank", requests.stop_asked)
    return 0 if completed else Preempted.exit_code


def _fit_past_spikes(run: Run) -> int:
    """Train, and go back as often as the config allows; returns the number of steps done."""
    parts = parts_from(run, run.start)
    while True:
        try:
            return fit(parts)
        except RollBack as spike:
            parts = go_back(run, spike)
        except DivergenceError:  # which every rank raises after the same step
            run.saver.settle()
            raise


def _end_fatally(folder: RunFolder, run: Run | None, error: MMPretrainError) -> None:
    """Leave the outcome where a supervisor looks, from any rank; a folder that cannot be written has no outcome."""
    if run is not None:
        run.trackers.close("fatal")
    if isinstance(error, RunTaken) or not folder.path.is_dir():
        return
    try:
        if run is None:
            folder.refuse_attempt(str(error))
        else:
            folder.write_outcome("fatal", run.step, str(error))
    except OSError as fault:
        log.warning("outcome.json could not be written: %s", fault)


def _lost_process(error: RuntimeError) -> ClusterError | None:
    """What PyTorch's errors about a process that is no longer there mean; None for other errors."""
    if "DataLoader worker" in str(error):
        return ClusterError(
            f"a process that decodes data ended ({error}), most often killed for want of memory; lower data.workers "
            f"or data.prefetch, then start the run again: it continues from its newest checkpoint"
        )
    if any(mark in str(error) for mark in ("Connection closed by peer", "Connection reset by peer")):
        return ClusterError(f"another rank ended, so this one stops too; its own message says why ({error})")
    return None
