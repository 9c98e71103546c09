"""Open a trained model where it lies.

Enter: a run folder (its newest valid checkpoint counts), a checkpoint, or a published folder. Leave: a `Model`.
Refused: folders that hold none of these, another library's model, damaged files.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModel

from mmpretrain.core.errors import CheckpointError
from mmpretrain.inference.model import Model
from mmpretrain.inference.processor import Processor
from mmpretrain.models.multimodal import MultimodalConfig, MultimodalTransformer
from mmpretrain.models.quiet import no_progress_bar


def load(source: str | Path, device: str | None = None) -> Model:
    """The model with its processor; on a GPU where there is one, unless `device` says otherwise."""
    path = Path(source)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (path / "config.json").is_file():
        return _published(path, place)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        return _trained(path, place)
    seen = "is not there" if not path.exists() else "is a file" if path.is_file() else "holds none of them"
    raise CheckpointError(f"{path} {seen}; name a published folder, a run folder or one of its checkpoints")


def _published(path: Path, device: torch.device) -> Model:
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}") from error
    if kind != MultimodalConfig.model_type:
        raise CheckpointError(
            f"{path} holds a model of type {kind!r}, which its own library loads; name a folder that "
            "`mmpretrain publish` wrote"
        )
    try:
        with no_progress_bar():
            network = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the weights of {path} cannot be loaded: {error}") from error
    assert isinstance(network, MultimodalTransformer)
    return Model(network, Processor.from_pretrained(path), path, device)


def _trained(path: Path, device: torch.device) -> Model:
    from mmpretrain.training.ranks import choose_accelerator

    choose_accelerator()  # before what imports DeepSpeed
    from mmpretrain.training.trained import open_trained

    run = open_trained(path)
    tokenizer = None if run.tokenizer is None else str(run.tokenizer)
    processor = Processor.build(run.model.config.parsed_model(), run.config.data.codecs, tokenizer)
    return Model(run.model, processor, path, device)
