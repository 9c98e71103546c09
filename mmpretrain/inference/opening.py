"""Open a trained model where it lies.

Enter: a run folder (its newest valid checkpoint counts), a checkpoint, or a published folder. Leave: a `Model`.
Refused: folders that hold none of these, another library's model, damaged files.
"""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError

from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.json_text import parse_json
from mmpretrain.inference.model import Model
from mmpretrain.inference.processor import Processor
from mmpretrain.models.multimodal import MultimodalConfig, MultimodalTransformer
from mmpretrain.models.published import check_published
from mmpretrain.models.quiet import no_progress_bar

Loaded = tuple[MultimodalTransformer, dict[str, list[str]]]


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
        kind = parse_json((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}") from error
    if kind != MultimodalConfig.model_type:
        raise CheckpointError(
            f"{path} holds a model of type {kind!r}, which its own library loads; name a folder that "
            "`mmpretrain publish` wrote"
        )
    check_published(path)
    try:
        with no_progress_bar():
            network, found = cast(
                Loaded,
                MultimodalTransformer.from_pretrained(
                    path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
                ),
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the weights of {path} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"the weights of {path} lack {len(missing)} tensors of its model (first: {missing[0]})")
    return Model(network, Processor.from_pretrained(path), path, device)


def _trained(path: Path, device: torch.device) -> Model:
    from mmpretrain.training.ranks import choose_accelerator

    choose_accelerator()  # before what imports DeepSpeed
    from mmpretrain.training.trained import open_trained

    run = open_trained(path)
    tokenizer = None if run.tokenizer is None else str(run.tokenizer)
    processor = Processor.build(run.model.config.parsed_model(), run.config.data.codecs, tokenizer)
    return Model(run.model, processor, path, device)
