"""What a run can be asked from outside: SIGTERM, SIGUSR1, and the control files `stop` and `save`.

Enter: signals to any rank, files that the main rank sees. Leave: two flags, read once per step and agreed by all ranks
in the reporter's one collective.
"""

import signal
from types import FrameType

from mmpretrain.training.run_folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """This rank's view of what was asked; `install` must be called from the main thread."""

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self._stop = False

    def install(self) -> None:
        """Turn the stop signals into a flag, so that the step in hand ends and a checkpoint is written."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def stop(self) -> bool:
        """Whether this rank was asked to stop, now or before."""
        if self.folder is not None and self.folder.take_control("stop"):
            self._stop = True
        return self._stop

    def save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        return self.folder is not None and self.folder.take_control("save")
