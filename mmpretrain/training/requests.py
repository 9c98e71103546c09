"""What a run can be asked from outside: SIGTERM, SIGUSR1, SIGUSR2, and the control files stop, save, eval and stacks.

Enter: signals to any rank, files that the main rank sees. Leave: flags, read once per step and agreed by all ranks in
the reporter's one collective; and on SIGUSR2, at once, the stacks of all threads, even of a rank that hangs.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path
from types import FrameType

from mmpretrain.core import run_files
from mmpretrain.training.file_writer import die_with
from mmpretrain.training.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """This rank's view of what was asked; `install` must be called from the main thread."""

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.stop_reason = ""
        """Who asked for the stop: the text of control/stop, or the signal."""
        self.stop_asked: float | None = None
        """When, in seconds since 1970; None where nobody asked this rank."""
        self._stop = False

    def install(self) -> None:
        """Turn the stop signals into a flag, so that the step in hand ends and a checkpoint is written."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        faulthandler.register(signal.SIGUSR2, all_threads=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        self.stop_asked = self.stop_asked or time.time()
        self.stop_reason = self.stop_reason or f"signal {signal.Signals(number).name}"

    def stop(self) -> bool:
        """Whether this rank was asked to stop, now or before."""
        text = self._take("stop")
        if text is not None:
            self._stop = True
            self.stop_asked = self.stop_asked or time.time()
            self.stop_reason = text or "control/stop"
        return self._stop

    def save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        return self._take("save") is not None

    def evaluate(self) -> bool:
        """Whether an evaluation was asked for since the last call."""
        return self._take("eval") is not None

    def stacks(self) -> bool:
        """Whether the stacks of all ranks were asked for since the last call."""
        return self._take("stacks") is not None

    def _take(self, name: str) -> str | None:
        return None if self.folder is None else self.folder.take_control(name)


def answer_stack_requests(run: Path, rank: int) -> None:
    """From now on SIGUSR2 appends the stacks of all threads to the rank's stack file, whatever the rank is doing."""
    path = run_files.stack_file(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.register(signal.SIGUSR2, file=path.open("a"), all_threads=True)


def die_with_parent() -> None:
    """Have the kernel kill this rank when the torchrun that started it dies, so that none is left holding a GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
