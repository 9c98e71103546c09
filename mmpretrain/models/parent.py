"""Another model's weights under our names, for a run that starts from them.

Enter: a folder that `publish` wrote, or one of transformers (CLIPModel, SiglipModel, ViTModel, BERT and any other
encoder), or a hub name. Leave: `Parent`. Refused: names that lead to no model. Native towers take over weights whose
architecture they can compute; towers of kind hf_auto take over any encoder of their own architecture.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPConfig, PretrainedConfig, PreTrainedModel, SiglipConfig, ViTConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.hub import cached_file

from mmpretrain.core.errors import CheckpointError
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.foreign_weights import UNREADABLE, first_line
from mmpretrain.models.hf_encoders import encoder_of
from mmpretrain.models.layouts.clip import LOGIT_SCALE, clip_architecture, clip_table
from mmpretrain.models.layouts.siglip import LOGITS, siglip_architecture, siglip_table
from mmpretrain.models.layouts.tables import State, Table, to_ours
from mmpretrain.models.layouts.towers import HALVES, Channels, Pixels, halves
from mmpretrain.models.layouts.vit import vit_architecture, vit_table
from mmpretrain.models.multimodal import MultimodalConfig, MultimodalTransformer
from mmpretrain.models.published import check_published
from mmpretrain.models.towers.base import TowerConfig
from mmpretrain.models.towers.hf_auto import HFAutoTowerConfig

NATIVE_TYPES = ("clip", "siglip", "vit")
"""Architectures of transformers that native towers compute as well."""


@dataclass(frozen=True)
class Parent:
    """A model to start from."""

    source: str
    """What the user named."""
    description: str
    """What was found there, e.g. "CLIPModel"."""
    towers: Mapping[str, TowerConfig]
    """Modality -> its tower in our terms."""
    weights: Mapping[str, Tensor]
    """Under our names; "logit_scale" and "logit_bias" belong to whatever contrasts image and text."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer that its texts were read with."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Modality -> why nothing there can go into that tower."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Weights without a place in the towers asked for, under the parent's own names -> how many values they hold."""


def open_pretrained(name: str, child: Mapping[str, TowerConfig]) -> Parent:
    """The model in a folder or on the hub, read for the kinds of tower that `child` has."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        raise CheckpointError(
            f"--from {name} is neither a run folder nor a checkpoint, and no model folder or reachable hub name of "
            f"transformers ({first_line(error)})"
        ) from error
    try:
        if isinstance(config, MultimodalConfig):
            return _published(name, config)
        return _transformers(name, config, child)
    except UNREADABLE as error:
        raise CheckpointError(
            f"--from {name} has a config.json and its weights cannot be read ({first_line(error)})"
        ) from error


def _published(name: str, config: MultimodalConfig) -> Parent:
    folder = Path(name)
    if folder.is_dir():
        check_published(folder)
    model = MultimodalTransformer.from_pretrained(name, use_safetensors=True)
    return Parent(
        source=name,
        description="a published mmpretrain model",
        towers=config.parsed_model().towers,
        weights=model.state_dict(),
        tokenizer=_tokenizer(name),
    )


def _transformers(name: str, config: PretrainedConfig, child: Mapping[str, TowerConfig]) -> Parent:
    model, state = _load(name)
    auto = {modality: tower for modality, tower in child.items() if isinstance(tower, HFAutoTowerConfig)}
    native = _read_natively(config, name, state, without=auto)
    whole = _read_whole(config, model, auto)
    towers = native.towers | whole.towers
    missing = [modality for modality in child if modality not in towers]
    used = native.used | whole.used
    return Parent(
        source=name,
        description=type(model).__name__,
        towers=towers,
        weights=native.weights | whole.weights,
        tokenizer=_tokenizer(name),
        obstacles={modality: _obstacle(config.model_type, modality, name) for modality in missing},
        unread={part: tensor.numel() for part, tensor in state.items() if part not in used},
    )


@dataclass
class _Found:
    """Towers read so far."""

    towers: dict[str, TowerConfig] = field(default_factory=dict)
    weights: State = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Their names of what was read."""


def _read_natively(config: PretrainedConfig, name: str, state: State, without: Collection[str]) -> _Found:
    """The halves that native towers compute as well, but for those that the model has as towers of transformers."""
    reading = _native_reading(config, name)
    if reading is None:
        return _Found()
    towers = {modality: tower for modality, tower in reading.model.towers.items() if modality not in without}
    rows = [row for row in reading.table if row.ours[0].split(".")[1:2] in ([], *([each] for each in towers))]
    used = {part for row in rows for part in row.theirs}
    return _Found(towers, to_ours(rows, state, reading.shapes()), used)


def _read_whole(config: PretrainedConfig, model: PreTrainedModel, child: Mapping[str, HFAutoTowerConfig]) -> _Found:
    """Encoders as they are, for towers of the same architecture."""
    found = _Found()
    for modality, tower in child.items():
        if tower.whole_config().model_type != config.model_type:
            continue
        encoder = encoder_of(model, modality).state_dict()
        places = {tensor.data_ptr() for tensor in encoder.values()}
        found.towers[modality] = tower
        found.weights |= {f"towers.{modality}.model.{part}": tensor for part, tensor in encoder.items()}
        found.used |= {part for part, tensor in model.state_dict().items() if tensor.data_ptr() in places}
    return found


def _obstacle(model_type: str, modality: str, name: str) -> str:
    """Why no tower of that modality was found."""
    if model_type in NATIVE_TYPES:
        return f"a {model_type} has none, or the tower is of another architecture"
    return (
        f"only towers of kind hf_auto and of this architecture can hold a {model_type} (native ones hold "
        f"{', '.join(NATIVE_TYPES)}); set model.towers.{modality} to {{kind: hf_auto, name: {name}}}"
    )


def _load(name: str) -> tuple[PreTrainedModel, State]:
    """The model, and those of its weights that were found in the folder."""
    model, info = AutoModel.from_pretrained(
        name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    return model, {part: tensor for part, tensor in model.state_dict().items() if part not in info["missing_keys"]}


@dataclass(frozen=True)
class _Reading:
    """A model of transformers as a native one."""

    model: ModelConfig
    table: Table

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of our tensors."""
        with torch.device("meta"):
            empty = MultimodalTransformer.create(self.model, {})
        scalars = {"logit_scale": torch.Size([1]), "logit_bias": torch.Size([1])}
        return {part: tensor.shape for part, tensor in empty.state_dict().items()} | scalars


def _native_reading(config: PretrainedConfig, name: str) -> _Reading | None:
    pixels = _pixels(name) or (Pixels(CLIP_MEAN, CLIP_STD) if isinstance(config, CLIPConfig) else HALVES)
    if isinstance(config, CLIPConfig):
        table = clip_table(*(half.num_hidden_layers for half in halves(config)))
        return _Reading(ModelConfig.model_validate(clip_architecture(config, pixels)), [*table, *LOGIT_SCALE])
    if isinstance(config, SiglipConfig):
        table = siglip_table(*(half.num_hidden_layers for half in halves(config)))
        return _Reading(ModelConfig.model_validate(siglip_architecture(config, pixels)), [*table, *LOGITS])
    if isinstance(config, ViTConfig):
        model = ModelConfig.model_validate(vit_architecture(config, pixels))
        return _Reading(model, vit_table(config.num_hidden_layers))
    return None


def _pixels(name: str) -> Pixels | None:
    """How the pixels were normalised, where the folder says so."""
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return Pixels(cast(Channels, tuple(fields["image_mean"])), cast(Channels, tuple(fields["image_std"])))
    except (OSError, KeyError):
        return None


def _tokenizer(name: str) -> str | None:
    """The name itself where a tokenizer stands beside the weights."""
    found = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    return None if found is None else name
