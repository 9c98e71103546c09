"""`python -m launcher.signal_ranks RUN SIGNAL`: send a signal to those ranks of a run that live on this node.

Straight to the ranks, since torchrun would take most signals for the order to stop. A process that is not the rank that
wrote its number, because numbers are used again, is left alone.
"""

import os
import signal
import sys
from pathlib import Path

from mmpretrain.core import run_files


def signal_ranks(run: Path, number: int) -> int:
    """How many ranks were signalled."""
    here = run_files.node_name()
    count = 0
    for rank in run_files.read_ranks(run):
        if rank.node == here and is_rank(rank.pid):
            os.kill(rank.pid, number)
            count += 1
    return count


def is_rank(pid: int) -> bool:
    """Whether a process is one that torchrun started."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"TORCHELASTIC_RUN_ID=" in environment


if __name__ == "__main__":
    signal_ranks(Path(sys.argv[1]), signal.Signals[sys.argv[2]])
