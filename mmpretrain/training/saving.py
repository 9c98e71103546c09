"""Writing a checkpoint in two parts: all of it into memory; and, once it is on disk, its manifest and name.

Enter: a live engine and the run's position. Leave: a `Saving`, while whose files are written the engine may go on; in
the end a folder that is whole, or is not there. What any rank could not write, every rank refuses.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from mmpretrain.core import collectives
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.run_files import CONFIG, MANIFEST
from mmpretrain.training.engine import Engine
from mmpretrain.training.fragments import get_optimizer_step
from mmpretrain.training.manifest import Manifest, Piece, Position, address, sha256, write_manifest
from mmpretrain.training.random_states import random_states
from mmpretrain.training.retention import name_of
from mmpretrain.training.snapshot import Snapshot, Writing, WrittenFile

ResultT = TypeVar("ResultT")
_Place = tuple[str, str, int, int]
"""Name, key, offset and length of a fragment."""


def begin(engine: Engine, snapshot: Snapshot, folder: Path, position: Position, config_yaml: str) -> Saving:
    """Take what `folder/step-XXXXXXXX` will hold into memory and begin to write it. Communicates.

    `finish` of what is returned must have ended before the snapshot is used again.
    """
    final = folder / name_of(position.step)
    partial = folder / f".{final.name}.partial"
    errors = vote(attempt(lambda: _make_empty(partial)) if collectives.rank() == 0 else [])
    if errors:
        _refuse(final, partial, errors)
    return Saving(engine, snapshot, final, partial, position, config_yaml)


@dataclass
class _Report:
    """What one rank tells of its file; `error` is None when it was written."""

    file: str
    places: Sequence[_Place]
    written: WrittenFile | None = None
    error: str | None = None


class Saving:
    """A checkpoint whose files are being written."""

    def __init__(
        self, engine: Engine, snapshot: Snapshot, final: Path, partial: Path, position: Position, config_yaml: str
    ) -> None:
        """Copies all that the next forward may change, and has the engine's next update wait until the rest is copied;
        an error of this rank is told by `finish`."""
        begun = time.monotonic()
        self.final, self.partial = final, partial
        self.config_yaml = config_yaml
        self.position, self.zero_stage = position, engine.stage
        self.optimizer_step, self.shapes = get_optimizer_step(engine.deepspeed, engine.stage), shapes(engine)
        self._report = _Report(file_of(collectives.rank()), [])
        self._writing: Writing | None = None
        self._fail_if(attempt(lambda: self._start(engine, snapshot)))
        self.seconds = time.monotonic() - begun
        """What saving took so far, without the time in which the run went on."""

    @property
    def is_written(self) -> bool:
        """Whether this rank's file is on disk, or will never be. Does not communicate."""
        return self._writing is None or self._writing.is_over

    def finish(self) -> Path:
        """Wait for the files of all ranks and make the checkpoint valid. Communicates; on failure nothing is left and
        every rank raises."""
        begun = time.monotonic()
        reports = collectives.gather_objects(self._wait())
        errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(reports) if one.error]
        written = [one.written for one in reports if one.written is not None]
        if not errors:
            errors = vote(attempt(lambda: self._make_valid(reports)) if collectives.rank() == 0 else [])
        if errors:
            _refuse(self.final, self.partial, errors)
        self.seconds += max([time.monotonic() - begun, *(one.seconds for one in written)])
        return self.final

    def _start(self, engine: Engine, snapshot: Snapshot) -> None:
        now: dict[str, Tensor] = {f"rng/{name}": state for name, state in random_states().items()}
        owned = [one for one in engine.fragments() if one.owned]
        self._report.places = [(one.name, one.key, one.offset, one.view.numel()) for one in owned]
        later = {address(one.name, one.key, one.offset): one.view for one in owned if one.key != "replica"}
        now |= {address(one.name, one.key, one.offset): one.view for one in owned if one.key == "replica"}
        self._writing = snapshot.write(self.partial / self._report.file, now, later)
        engine.hold_update(self._writing.wait_until_copied)

    def _wait(self) -> _Report:
        self._fail_if(attempt(self._take_written))
        return self._report

    def _take_written(self) -> None:
        if self._writing is not None:
            self._report.written = self._writing.wait()

    def _fail_if(self, errors: list[str]) -> None:
        self._report.error = errors[0] if errors else self._report.error

    def _make_valid(self, reports: Sequence[_Report]) -> None:
        config = self.partial / CONFIG
        config.write_text(self.config_yaml)
        files = {one.file: (one.written.size, one.written.digest) for one in reports if one.written is not None}
        files[CONFIG] = (config.stat().st_size, sha256(config))
        write_manifest(self.partial, self._manifest(reports, files))
        for path in (config, self.partial / MANIFEST, self.partial):
            _fsync(path)
        _put_in_place(self.partial, self.final)

    def _manifest(self, reports: Sequence[_Report], files: dict[str, tuple[int, str]]) -> Manifest:
        pieces: dict[str, dict[str, list[Piece]]] = {}
        for one in reports:
            for name, key, offset, length in one.places:
                pieces.setdefault(name, {}).setdefault(key, []).append(Piece(offset, length, one.file))
        for kinds in pieces.values():
            for parts in kinds.values():
                parts.sort(key=lambda piece: piece.offset)
        return Manifest(
            position=self.position,
            zero_stage=self.zero_stage,
            world_size=collectives.world_size(),
            optimizer_step=self.optimizer_step,
            shapes=self.shapes,
            pieces=pieces,
            files=files,
        )


def file_of(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Of every parameter and buffer, whole."""
    found = {name: list(buffer.shape) for name, buffer in engine.deepspeed.module.named_buffers()}
    for name, parameter in engine.deepspeed.module.named_parameters():
        found[name] = list(parameter.ds_shape if engine.stage == 3 else parameter.shape)
    return found


def attempt(action: Callable[[], ResultT]) -> list[str]:
    """Run what may fail on one rank only; the message instead of the exception, so that ranks can vote."""
    try:
        action()
    except (OSError, SafetensorError, CheckpointError) as fault:
        return [str(fault)]
    return []


def vote(errors: list[str]) -> list[str]:
    """All ranks' errors on every rank. Communicates."""
    return [error for rank_errors in collectives.gather_objects(errors) for error in rank_errors]


def _refuse(final: Path, partial: Path, errors: Sequence[str]) -> NoReturn:
    if collectives.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise CheckpointError(f"checkpoint {final} could not be written ({errors[0]}); earlier checkpoints are untouched")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename; a checkpoint of this name from before, which a run that went back overtakes, makes way."""
    former = final.with_name(f".{final.name}.removed")
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
    partial.rename(final)
    _fsync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
