"""Our own checkpoints: flat fragments in safetensors, whole or not there at all, for any ranks and any ZeRO stage.

Enter: a live engine and the run's position. Leave: `checkpoints/step-XXXXXXXX/` with one file per rank and a manifest
of sizes and SHA-256, renamed into place last. Refuses damaged files and checkpoints of another model or data order.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmpretrain.core import collectives
from mmpretrain.core.errors import CheckpointError
from mmpretrain.training.engine import Engine
from mmpretrain.training.fragments import (
    Fragment,
    get_optimizer_step,
    refresh,
    set_optimizer_step,
)
from mmpretrain.training.manifest import (
    Manifest,
    Piece,
    Position,
    Reader,
    address,
    damage,
    read_manifest,
    sha256,
    write_manifest,
)
from mmpretrain.training.random_states import random_states, restore_random_states

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


@dataclass
class _Written:
    """What one rank reports of its file; `error` is None when it was written."""

    file: str
    size: int = 0
    digest: str = ""
    pieces: list[tuple[str, str, int, int]] = field(default_factory=list)
    error: str | None = None


def save(engine: Engine, folder: Path, position: Position, config_yaml: str) -> Path:
    """Write `folder/step-XXXXXXXX` and return it. Communicates; on failure nothing is left and every rank raises."""
    final = folder / f"step-{position.step:08d}"
    partial = folder / f".{final.name}.partial"
    errors = _vote(_attempt(lambda: _make_empty(partial)) if collectives.rank() == 0 else [])
    if not errors:
        written = collectives.gather_objects(_write_rank(engine, partial))
        errors = [f"rank {rank}: {one.error}" for rank, one in enumerate(written) if one.error]
    if not errors:
        manifest = _manifest(engine, position, written)
        last = _attempt(lambda: _finish(manifest, config_yaml, partial, final)) if collectives.rank() == 0 else []
        errors = _vote(last)
    if errors:
        if collectives.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({errors[0]}); earlier checkpoints are untouched"
        )
    return final


def load(engine: Engine, folder: Path) -> Position | None:
    """Restore the newest valid checkpoint in `folder`; None when there is none. Communicates.

    Damaged ones are reported and passed over; CheckpointError when all are damaged.
    """
    path, manifest = find_newest_valid(folder)
    if path is None or manifest is None:
        return None
    errors = _vote(_attempt(lambda: _restore(engine, path, manifest)))
    if errors:
        raise CheckpointError(f"{path}: {errors[0]}")
    if engine.average is None and manifest.has_average and collectives.rank() == 0:
        log.warning("%s holds a moving average of the weights, which this run does not carry on; ema would", path)
    refresh(engine.deepspeed, engine.stage)
    set_optimizer_step(engine.deepspeed, engine.stage, manifest.optimizer_step)
    engine.deepspeed.global_steps = manifest.position.step
    engine.deepspeed.global_samples = manifest.position.samples
    return manifest.position


def find_newest_valid(folder: Path) -> tuple[Path | None, Manifest | None]:
    """The newest checkpoint whose every file has the size and digest of its manifest. Communicates: ranks share the
    hashing and agree."""
    candidates = sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []
    candidates = collectives.gather_objects(candidates)[0]
    for path in candidates:
        manifest, fault = _inspect(path)
        faults = [one for one in collectives.gather_objects(fault) if one]
        if not faults:
            return path, manifest
        if collectives.rank() == 0:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, faults[0])
    if candidates:
        raise CheckpointError(
            f"no valid checkpoint among {len(candidates)} in {folder} (newest: {candidates[0].name}); "
            f"move the folder away to start again from step 0"
        )
    return None, None


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_rank(engine: Engine, partial: Path) -> _Written:
    file = _file_of(collectives.rank())
    report = _Written(file)
    tensors: dict[str, Tensor] = {f"rng/{name}": state for name, state in random_states().items()}
    for one in engine.fragments():
        if one.owned:
            tensors[address(one.name, one.key, one.offset)] = one.view.detach().cpu().clone()
            report.pieces.append((one.name, one.key, one.offset, one.view.numel()))
    errors = _attempt(lambda: save_file(tensors, partial / file))
    errors += [] if errors else _attempt(lambda: _settle(partial / file))
    if errors:
        report.error = errors[0]
        return report
    report.size, report.digest = (partial / file).stat().st_size, sha256(partial / file)
    return report


def _manifest(engine: Engine, position: Position, written: Sequence[_Written]) -> Manifest:
    pieces: dict[str, dict[str, list[Piece]]] = {}
    for one in written:
        for name, key, offset, length in one.pieces:
            pieces.setdefault(name, {}).setdefault(key, []).append(Piece(offset, length, one.file))
    for kinds in pieces.values():
        for parts in kinds.values():
            parts.sort(key=lambda piece: piece.offset)
    return Manifest(
        position=position,
        zero_stage=engine.stage,
        world_size=collectives.world_size(),
        optimizer_step=get_optimizer_step(engine.deepspeed, engine.stage),
        shapes=_shapes(engine),
        pieces=pieces,
        files={one.file: (one.size, one.digest) for one in written},
    )


def _shapes(engine: Engine) -> dict[str, list[int]]:
    shapes = {name: list(buffer.shape) for name, buffer in engine.deepspeed.module.named_buffers()}
    for name, parameter in engine.deepspeed.module.named_parameters():
        shapes[name] = list(parameter.ds_shape if engine.stage == 3 else parameter.shape)
    return shapes


def _finish(manifest: Manifest, config_yaml: str, partial: Path, final: Path) -> None:
    (partial / "config.yaml").write_text(config_yaml)
    write_manifest(partial, manifest)
    for path in (partial / "config.yaml", partial / "manifest.json", partial):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(final.parent)


def _inspect(path: Path) -> tuple[Manifest | None, str | None]:
    """This rank's share of checking a checkpoint: the manifest, and every W-th file."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as fault:
        return None, str(fault)
    mine = range(collectives.rank(), len(manifest.files), collectives.world_size())
    return manifest, damage(path, manifest, mine)


def _restore(engine: Engine, path: Path, manifest: Manifest) -> None:
    _check_same_model(engine, manifest)
    with Reader(path) as reader:
        for one in engine.fragments():
            kinds = manifest.pieces[one.name]
            key = "master" if one.key == "average" and one.key not in kinds else one.key  # an average begins here
            if key not in kinds:
                _fill_untrained(one)
                continue
            with torch.no_grad():
                one.view.copy_(reader.read(one.name, key, kinds[key], one.offset, one.view.numel()))
        mine = _file_of(collectives.rank())
        restore_random_states(reader.tensors(mine, "rng/") if mine in manifest.files else {})


def _fill_untrained(one: Fragment) -> None:
    """A parameter that was frozen when the checkpoint was written has no moments: they start at zero."""
    if one.key in ("exp_avg", "exp_avg_sq"):
        one.view.zero_()
        return
    raise CheckpointError(f"{one.name} has no {one.key!r} in the checkpoint; was it frozen in the run that wrote it?")


def _check_same_model(engine: Engine, manifest: Manifest) -> None:
    here, there = _shapes(engine), dict(manifest.shapes)
    if here == there:
        return
    missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    changed = sorted(name for name in set(here) & set(there) if here[name] != there[name])
    raise CheckpointError(
        "the checkpoint belongs to another model: "
        + "; ".join(
            f"{len(names)} {what} (first: {names[0]})"
            for names, what in (
                (missing, "tensors it lacks"),
                (extra, "tensors the model lacks"),
                (changed, "tensors of another shape"),
            )
            if names
        )
        + "; start a new run in another output folder"
    )


def _attempt(action: Callable[[], ResultT]) -> list[str]:
    """Run what may fail on one rank only; the message instead of the exception, so that ranks can vote."""
    try:
        action()
    except (OSError, SafetensorError, CheckpointError) as fault:
        return [str(fault)]
    return []


def _vote(errors: list[str]) -> list[str]:
    """All ranks' errors on every rank. Communicates."""
    return [error for rank_errors in collectives.gather_objects(errors) for error in rank_errors]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _settle(path: Path) -> None:
    """On disk for good, and readable to the group: safetensors writes files that only their owner may read."""
    path.chmod(0o644)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
