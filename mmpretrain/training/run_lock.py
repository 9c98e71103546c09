"""One process at a time trains in a run folder.

Enter: a run folder. Leave: a lock on it that this process holds until it ends, however it ends. Refused: a folder in
which another process still trains after a wait. File systems without locks have none.
"""

import fcntl
import logging
import time
from pathlib import Path
from typing import IO

from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError

LOCK = "lock"
PATIENCE_S = 60.0
"""A process that was killed may take so long to be gone, the more so on another node."""
_POLL_S = 0.2

log = logging.getLogger(__name__)
_held = list[IO[str]]()
"""To close one gives its lock back."""


class RunTaken(ClusterError):
    """Another process trains there; its run's record is not this one's to write."""


def lock_run(folder: Path, patience_s: float = PATIENCE_S) -> None:
    """Raise RunTaken naming the process that trains there. Data workers, which are forked, do not share the lock
    (POSIX record locks), so that one which outlives its rank does not hold it."""
    file = (folder / LOCK).open("a")
    end, told = time.monotonic() + patience_s, False
    while not _try(file.fileno()):
        other = next((f"process {one.pid} on {one.node}" for one in run_files.read_ranks(folder)), "another process")
        if time.monotonic() > end:
            file.close()
            raise RunTaken(
                f"{folder} is being trained by {other}; stop it (touch {folder}/control/stop), or set another output"
            )
        if not told:
            log.warning("%s is being trained by %s; waiting %g s for its end", folder, other, patience_s)
        told = True
        time.sleep(_POLL_S)
    _held.append(file)


def _try(descriptor: int) -> bool:
    """False where another process holds the lock."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX leaves open which
        return False
    except OSError as fault:
        log.info("the run folder's file system has no locks (%s)", fault.strerror)
    return True
