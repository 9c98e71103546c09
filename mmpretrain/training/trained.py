"""A finished or interrupted run opened again: its config, weights, tokenizer and codecs, without an engine.

Enter: a run folder (its newest valid checkpoint counts) or one checkpoint. Leave: `TrainedRun` on the CPU. Refused: a
folder without checkpoints, damaged ones, weights of another model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer import tokenizer_facts
from mmpretrain.config import RunConfig
from mmpretrain.core.config import load_config
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.run_files import CONFIG, MANIFEST
from mmpretrain.core.types import Codec
from mmpretrain.models.config import resolve
from mmpretrain.models.lora import add_adapters, merge_adapters
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training.checkpoint import find_newest_valid
from mmpretrain.training.manifest import Position, damage, read_manifest, read_weights
from mmpretrain.training.parts import build_codecs


@dataclass(frozen=True)
class TrainedRun:
    """A model as a checkpoint holds it, its adapters merged, and what it was trained with."""

    config: RunConfig
    model: MultimodalTransformer
    codecs: Mapping[str, Codec]
    tokenizer: Path | None
    """Folder of the tokenizer; None for models without text."""
    position: Position
    run_dir: Path
    averaged: bool = False
    """Whether its weights are the moving average of those of the run."""


def open_trained(path: Path, overrides: tuple[str, ...] = (), averaged: bool = False) -> TrainedRun:
    """Open a run or checkpoint; `overrides` change the recorded config, e.g. its evaluation. `averaged` takes the
    moving average of the weights. Communicates."""
    checkpoint, run_dir = _locate(path)
    manifest = read_manifest(checkpoint)
    if fault := damage(checkpoint, manifest, manifest.files.keys() & {CONFIG}):
        raise CheckpointError(f"{checkpoint}: {fault}")
    config = load_config(RunConfig, checkpoint / CONFIG, overrides)
    name = config.data.tokenizer.path or str(run_dir / "tokenizer")
    tokenizer = load_tokenizer(name) if "text" in config.data.codecs else None
    model_config = resolve(config.model, None if tokenizer is None else tokenizer_facts(tokenizer))
    model = MultimodalTransformer.create(model_config, config.objectives)
    if config.finetune is not None:
        add_adapters(model, config.finetune)
    _fill(model, read_weights(checkpoint, averaged), checkpoint)
    merge_adapters(model)
    model.train(False)
    return TrainedRun(
        config=config,
        model=model,
        codecs=build_codecs(config, model_config, name),
        tokenizer=None if tokenizer is None else Path(name),
        position=manifest.position,
        run_dir=run_dir,
        averaged=averaged,
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint."""
    return (path / MANIFEST).is_file() and (path / CONFIG).is_file()


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "checkpoints").is_dir()


def _locate(path: Path) -> tuple[Path, Path]:
    """The checkpoint to read, and the run folder it belongs to."""
    if is_checkpoint(path):
        return path, path.resolve().parents[1]
    found, _ = find_newest_valid(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} has no checkpoint; name a run folder that has saved one, or a checkpoint itself")
    return found, path


def _fill(model: MultimodalTransformer, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    if own.keys() != weights.keys():
        first = sorted(own.keys() ^ weights.keys())[0]
        raise CheckpointError(f"{checkpoint} and its config.yaml describe different models (first: {first})")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
