"""Our own checkpoints: flat fragments in safetensors, whole or not there at all, for any ranks and any ZeRO stage.

Enter: a live engine and the run's position. Leave: `checkpoints/step-XXXXXXXX/` with one file per rank and a manifest
of sizes and SHA-256, renamed into place last. Refuses damaged files and checkpoints of another model or data order.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mmpretrain.core import collectives
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.run_files import saved_checkpoints
from mmpretrain.training.engine import Engine
from mmpretrain.training.fragments import MOMENTS, refresh, set_optimizer_step
from mmpretrain.training.manifest import Manifest, Position, Reader, damage, read_manifest
from mmpretrain.training.random_states import restore_random_states
from mmpretrain.training.saving import attempt, begin, file_of, shapes, vote
from mmpretrain.training.snapshot import Snapshot

log = logging.getLogger(__name__)


def save(engine: Engine, folder: Path, position: Position, config_yaml: str) -> Path:
    """Write `folder/step-XXXXXXXX` and return it. Communicates; on failure nothing is left and every rank raises."""
    return begin(engine, Snapshot(), folder, position, config_yaml).finish()


def load(engine: Engine, folder: Path) -> Position | None:
    """Restore the newest valid checkpoint in `folder`; None when there is none. Communicates.

    Damaged ones are reported and passed over; CheckpointError when all are damaged.
    """
    path, manifest = find_newest_valid(folder)
    if path is None or manifest is None:
        return None
    errors = vote(attempt(lambda: _restore(engine, path, manifest)))
    if errors:
        raise CheckpointError(f"{path}: {errors[0]}")
    if engine.average is None and manifest.has_average and collectives.rank() == 0:
        log.warning("%s holds a moving average of the weights, which this run does not carry on; ema would", path)
    refresh(engine.deepspeed, engine.stage)
    set_optimizer_step(engine.deepspeed, engine.stage, manifest.optimizer_step)
    engine.deepspeed.global_steps = manifest.position.step
    engine.deepspeed.global_samples = manifest.position.samples
    if engine.loss_scale is not None:
        engine.loss_scale = manifest.position.loss_scale or engine.loss_scale
    return manifest.position


def find_newest_valid(folder: Path) -> tuple[Path | None, Manifest | None]:
    """The newest checkpoint whose every file has the size and digest of its manifest. Communicates: ranks share the
    hashing and agree."""
    candidates = collectives.gather_objects(saved_checkpoints(folder)[::-1])[0]
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


def _inspect(path: Path) -> tuple[Manifest | None, str | None]:
    """This rank's share of checking a checkpoint: the manifest, and every W-th file."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as fault:
        return None, str(fault)
    mine = sorted(manifest.files)[collectives.rank() :: collectives.world_size()]
    return manifest, damage(path, manifest, mine)


def _restore(engine: Engine, path: Path, manifest: Manifest) -> None:
    _check_same_model(engine, manifest)
    _check_same_optimizer(engine, manifest)
    with Reader(path) as reader:
        for one in engine.fragments():
            kinds = manifest.pieces[one.name]
            key = "master" if one.key == "average" and one.key not in kinds else one.key  # an average begins here
            if key not in kinds:
                raise CheckpointError(
                    f"{one.name} has no {key!r} in the checkpoint; was it frozen in the run that wrote it?"
                )
            with torch.no_grad():
                one.view.copy_(reader.read(one.name, key, kinds[key], one.offset, one.view.numel()))
        mine = file_of(collectives.rank())
        restore_random_states(reader.tensors(mine, "rng/") if mine in manifest.files else {})


def _check_same_optimizer(engine: Engine, manifest: Manifest) -> None:
    """Moments of another kind, or none, would be corrected for steps that they did not see."""
    here: dict[str, set[str]] = {}
    for one in engine.fragments():
        here.setdefault(one.name, set()).add(one.key)
    for name, keys in here.items():
        there = manifest.pieces[name].keys()
        if "master" in keys & there and keys & set(MOMENTS) != there & set(MOMENTS):
            raise CheckpointError(
                f"{name} was trained by another optimizer in the checkpoint; set optimizer.kind to that run's, or "
                "start a new run from it by `finetune --from`"
            )


def _check_same_model(engine: Engine, manifest: Manifest) -> None:
    here, there = shapes(engine), dict(manifest.shapes)
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
