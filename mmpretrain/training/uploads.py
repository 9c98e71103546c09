"""Copies of checkpoints in an object store, brought there by a process beside training.

Enter: the checkpoints of a run, as they become valid. Leave: their copies, and rows of `checkpoints.jsonl`. A copy that
fails is told and tried again after the next save; nothing here ends a run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mmpretrain
from mmpretrain.core.run_files import saved_checkpoints
from mmpretrain.tracking.fanout import Trackers
from mmpretrain.training.retention import name_of, step_of
from mmpretrain.training.run_folder import RunFolder


@dataclass(frozen=True)
class _Upload:
    """One that is under way."""

    step: int
    process: subprocess.Popen[bytes]


class Uploads:
    """One at a time, the newest first. The main rank alone has one of these; all ranks see its folder."""

    def __init__(self, url: str, folder: RunFolder, trackers: Trackers) -> None:
        self.url, self.folder, self.trackers = url, folder, trackers
        self._current: _Upload | None = None
        self._done = folder.uploaded_steps()
        self._looks = True
        """Whether there may be one to begin with."""

    @property
    def in_use(self) -> list[int]:
        """Steps of checkpoints that are being read."""
        return [] if self._current is None else [self._current.step]

    def saved(self, step: int) -> None:
        """A checkpoint became valid."""
        self._done.discard(step)
        self._looks = True
        self.advance()

    def advance(self) -> None:
        """Take note of an upload that has ended, and begin the next."""
        if self._current is not None and self._current.process.poll() is not None:
            self._end(self._current)
        if self._current is None and self._looks:
            left = self._left()
            self._looks = bool(left)
            self._current = _Upload(left[-1], self._start(left[-1])) if left else None

    def finish(self, limit_s: float) -> None:
        """Wait for all that are left, but no longer than this."""
        deadline = time.monotonic() + limit_s
        self._looks = True
        self.advance()
        while (upload := self._current) is not None:
            try:
                upload.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                upload.process.kill()
                upload.process.wait()
                self._fail(upload.step, f"it took longer than checkpoint.upload_wait_s={limit_s:g}")
                return
            self.advance()

    def _left(self) -> list[int]:
        """Checkpoints that are here and not there."""
        return sorted(set(map(step_of, saved_checkpoints(self.folder.checkpoints))) - self._done)

    def _start(self, step: int) -> subprocess.Popen[bytes]:
        path = self.folder.checkpoints / name_of(step)
        code = str(Path(mmpretrain.__path__[0]).parent)
        paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "mmpretrain.training.uploader", str(path), f"{self.url}/{path.name}"]
        return subprocess.Popen(
            [*command, str(os.getpid())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def _end(self, upload: _Upload) -> None:
        self._current = None
        output, _ = upload.process.communicate()
        code = upload.process.returncode
        if code:
            how = f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
            self._fail(upload.step, f"the process that copies it {how}")
            return
        told = json.loads(output)
        if "error" in told:
            self._fail(upload.step, told["error"])
            return
        self._done.add(upload.step)
        self.folder.note_checkpoint(upload.step, "uploaded", url=self.url, seconds=told["seconds"])
        self.trackers.note(f"checkpoint {name_of(upload.step)} is at {self.url}")

    def _fail(self, step: int, error: str) -> None:
        self._current, self._looks = None, False
        self.folder.note_checkpoint(step, "upload failed", url=self.url, error=error)
        self.trackers.alert("upload failed", f"checkpoint {name_of(step)} is not at {self.url}: {error}")
