"""The checkpoints of a run, one after the other: begun after a step, valid some steps later, kept by the rules, copied.

Enter: the numbers of steps after which to save. Leave: valid checkpoints, told to the trackers, the heartbeat and
`checkpoints.jsonl` as they become so. What cannot be written ends the run, on every rank after the same step.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import barrier
from mmpretrain.core.config import dump_yaml
from mmpretrain.core.ranks import World
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.fanout import Trackers
from mmpretrain.tracking.record import Figure
from mmpretrain.training.engine import Engine
from mmpretrain.training.manifest import Position
from mmpretrain.training.retention import retain
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.saving import Saving, begin
from mmpretrain.training.snapshot import Snapshot
from mmpretrain.training.spikes import read_rollbacks
from mmpretrain.training.uploads import Uploads


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
        best, url = config.checkpoint.keep_best, upload_folder(config)
        self._figure = None if best is None else Figure(folder.path, best.metric)
        self._uploads = None if url is None or not world.is_main else Uploads(url, folder, trackers)

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
        if self._uploads is not None:
            self._uploads.advance()

    def settle(self) -> None:
        """Wait until the checkpoint under way, if there is one, is valid. Communicates."""
        if self._saving is not None:
            with self._phase(self._saving.position.step):
                self._finish()

    def finish_uploads(self) -> None:
        """Wait, within the bound of the config, until copies of all checkpoints are in the object store. Communicates:
        a scheduler may end the node that waits soon after the others are done."""
        if self.config.checkpoint.upload is None:
            return
        if self._uploads is not None:
            with self._phase(self.engine.steps_done):
                self._uploads.finish(self.config.checkpoint.upload_wait_s)
        barrier()

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        path = saving.finish()
        self._has_saved = True
        if self.world.is_main:
            self._tell(saving.position.step, path, saving.seconds)

    def _tell(self, step: int, path: Path, save_s: float) -> None:
        """That a checkpoint is valid, to all who wait for it."""
        self.folder.note_save(save_s)
        self.folder.note_checkpoint(step, "valid", save_s=save_s)
        self.trackers.saved(step, path)
        figures = {} if self._figure is None else self._figure.read()
        in_use = [] if self._uploads is None else self._uploads.in_use
        retain(self.folder.checkpoints, step, self.config.checkpoint, figures, in_use)
        if self._uploads is not None:
            self._uploads.saved(step)

    def _position(self, step: int) -> Position:
        wandb_id = self.folder.path / "wandb_id"
        return Position(
            step=step,
            samples=step * self.config.global_batch_size,
            data_hash=self.data_hash,
            wandb_id=wandb_id.read_text().strip() if wandb_id.exists() else None,
            passed_over=read_rollbacks(self.folder.path),
            loss_scale=self.engine.loss_scale,
        )

    def _phase(self, step: int) -> AbstractContextManager[None]:
        return self.folder.phase("save", step) if self.world.is_main else nullcontext()


def upload_folder(config: RunConfig) -> str | None:
    """Where the copies of a run's checkpoints lie; None where there are to be none."""
    base = config.checkpoint.upload
    return None if base is None else f"{base.rstrip('/')}/{config.output.resolve().name}"
