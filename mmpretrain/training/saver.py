"""The checkpoints of a run, one after the other: begun after a step, valid some steps later, kept by the rules.

Enter: the numbers of steps after which to save. Leave: valid checkpoints, told to the trackers, the heartbeat and
`checkpoints.jsonl` as they become so. What cannot be written ends the run, on every rank after the same step.
"""

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext

from mmpretrain.config import RunConfig
from mmpretrain.core import run_files
from mmpretrain.core.config import dump_yaml
from mmpretrain.core.ranks import World
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.fanout import Trackers
from mmpretrain.training.engine import Engine
from mmpretrain.training.manifest import Position
from mmpretrain.training.retention import retain
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.saving import Saving, begin
from mmpretrain.training.snapshot import Snapshot
from mmpretrain.training.spikes import read_rollbacks

log = logging.getLogger(__name__)


class Saver:
    """At most one checkpoint is under way; the next waits for it. All ranks call each method after the same steps."""

    def __init__(
        self, config: RunConfig, engine: Engine, folder: RunFolder, world: World, trackers: Trackers, data_hash: str
    ) -> None:
        self.config, self.engine, self.folder, self.world, self.trackers = config, engine, folder, world, trackers
        self.data_hash = data_hash
        self._snapshot = Snapshot()
        self._saving: Saving | None = None
        self._has_saved = False

    @property
    def is_written(self) -> bool:
        """Whether a checkpoint is under way of which this rank has written its part. Does not communicate."""
        return self._saving is not None and self._saving.is_written

    def save(self, step: int) -> None:
        """Begin the checkpoint after so many steps. Communicates.

        The first of an attempt is waited for: it shows whether saving works, and how long it takes.
        """
        with self._phase(step):
            self._finish()
            snapshot = self._snapshot if self.config.checkpoint.background else Snapshot()
            config_yaml = dump_yaml(self.config)
            self._saving = begin(self.engine, snapshot, self.folder.checkpoints, self._position(step), config_yaml)
            if not (self.config.checkpoint.background and self._has_saved):
                self._finish()

    def after_step(self, report: StepReport) -> None:
        """Make the checkpoint under way valid once all ranks have written their parts. Communicates then."""
        if report.checkpoint_written:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint under way, if there is one, is valid. Communicates."""
        if self._saving is not None:
            with self._phase(self._saving.position.step):
                self._finish()

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        path = saving.finish()
        self._has_saved = True
        if self.world.is_main:
            step = saving.position.step
            self.folder.note_save(saving.seconds)
            self._record(step, "valid", save_s=saving.seconds)
            self.trackers.saved(step, path)
            retain(self.folder.checkpoints, step, self.config.checkpoint)

    def _position(self, step: int) -> Position:
        wandb_id = self.folder.path / "wandb_id"
        return Position(
            step=step,
            samples=step * self.config.global_batch_size,
            data_hash=self.data_hash,
            wandb_id=wandb_id.read_text().strip() if wandb_id.exists() else None,
            passed_over=read_rollbacks(self.folder.path),
        )

    def _phase(self, step: int) -> AbstractContextManager[None]:
        return self.folder.phase("save", step) if self.world.is_main else nullcontext()

    def _record(self, step: int, event: str, **more: object) -> None:
        row = {"step": step, "event": event, "time": time.time()} | more
        with (self.folder.path / run_files.CHECKPOINT_EVENTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
