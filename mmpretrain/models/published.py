"""A published folder looked at before transformers opens it, which would follow what a stranger wrote there.

Enter: a local folder. Leave: nothing. Refused: one that leads elsewhere (adapters of another base, weights in other
folders, towers whose architecture is still to be fetched), whose weights are pickles, whose config is garbage or
describes more than its weights hold, which would be made up and take all memory.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mmpretrain.core.errors import CheckpointError, ConfigError
from mmpretrain.core.folders import is_plain_name
from mmpretrain.core.json_text import parse_json
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalConfig, MultimodalTransformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_DEPTH, MAX_NUMBER = 1000, 100_000_000
"""Layers of a part, and any number at all: more than any model has, and few enough to count the weights that follow."""

Json = Mapping[str, Any]


def check_published(folder: Path) -> None:
    """CheckpointError where the folder is not what `mmpretrain publish` writes."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter_config.json, which leads to another model; remove it")
    config = _read(folder / CONFIG)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder / CONFIG} asks for quantization, which published models have not; remove it")
    for path, number in _giants(config):
        raise CheckpointError(f"{folder / CONFIG}: {path} is {number}, more than any model has")
    wanted, held = _count_wanted(folder, config), _count_held(folder)
    if held < wanted:
        raise CheckpointError(f"the weights of {folder} hold {held} values, and its config describes {wanted}")


def _giants(value: object, path: str = "") -> Iterator[tuple[str, int]]:
    """Numbers out of all bounds, each with its key."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _giants(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for child in value:
            yield from _giants(child, path)
    elif isinstance(value, int):
        is_depth = path.rpartition(".")[2] in ("depth", "depths") or path.endswith("layers")
        if value > (MAX_DEPTH if is_depth else MAX_NUMBER):
            yield path, value


def _count_wanted(folder: Path, config: Json) -> int:
    """Values of the model that the config describes; it is built without memory for that."""
    try:
        for modality, tower in ModelConfig.model_validate(config.get("model")).towers.items():
            if tower.reads_elsewhere(modality):
                raise ConfigError(f"the {modality} tower is still to be read from elsewhere")
        with torch.device("meta"):
            outline = MultimodalTransformer(
                MultimodalConfig(model=config["model"], objectives=config.get("objectives"))
            )
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(f"{folder / CONFIG} describes no model ({what}); publish the run again") from error
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model ({error}); publish the run again") from error
    return sum({id(tensor): tensor.numel() for tensor in outline.published_state().values()}.values())


def _count_held(folder: Path) -> int:
    """Values in its files of weights."""
    try:
        return sum(
            math.prod(opened.get_slice(name).get_shape())
            for file in _files(folder)
            for opened in [safe_open(folder / file, framework="pt")]
            for name in opened.keys()  # noqa: SIM118 - not a mapping
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be loaded: {error}") from error


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"the weights of {folder} cannot be loaded: there is no {WEIGHTS}, and weights of other kinds may run code"
        )
    named = _read(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(map(is_plain_name, named.values())):
        raise CheckpointError(f"{folder / INDEX} names files that are none of its folder; publish the run again")
    return sorted(set(named.values()))


def _read(path: Path) -> Json:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content
