"""`python -m launcher.chaos.strike RUN RANK BLOW`: break one rank of a run, on the node where it lives.

Enter: a run folder, the number of a rank, a blow. Leave: a rank that is gone, hangs, meets NaN, or has no room on its
disk. Refused: a rank that does not run here, since numbers of processes are used again.
"""

import os
import resource
import signal
import sys
from enum import StrEnum
from pathlib import Path

from launcher.signal_ranks import is_rank
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError

HANG, POISON = signal.SIGRTMIN, signal.SIGRTMIN + 1
"""What `mmpretrain.faulty_train` listens to."""
ROOM_BYTES = 100_000
"""The largest file that a rank without room can write."""


class Blow(StrEnum):
    """What is done to a rank."""

    KILL = "kill"
    HANG = "hang"
    POISON = "poison"
    FILL_DISK = "fill-disk"


def strike(run: Path, rank: int, blow: Blow) -> None:
    """Do it to a rank that runs on this machine."""
    pid = next((one.pid for one in run_files.read_ranks(run) if one.rank == rank), 0)
    if not is_rank(pid):
        raise ClusterError(f"rank {rank} of {run} does not run on {run_files.node_name()}")
    if blow is Blow.FILL_DISK:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))
    else:
        os.kill(pid, {Blow.KILL: signal.SIGKILL, Blow.HANG: HANG, Blow.POISON: POISON}[blow])


if __name__ == "__main__":
    strike(Path(sys.argv[1]), int(sys.argv[2]), Blow(sys.argv[3]))
