"""Encoders of the transformers library: found by name, without chance, the half of a dual model that is wanted.

Enter: a local folder or hub name. Leave: configs and encoders. Refused: names that hold no known architecture. Remote
code is never run.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mmpretrain.core.errors import ConfigError
from mmpretrain.layers.batch_norm import replace_batch_norm
from mmpretrain.layers.parameters import WordEmbedding
from mmpretrain.models.foreign_weights import UNREADABLE, first_line

HALVES = {"image": "vision", "text": "text", "video": "video", "audio": "audio"}
"""Modality -> what dual models (CLIP, SigLIP, CLAP) call the half that reads it."""

_RATES = ("dropout", "drop_path", "layerdrop")
_UNCHANCED: dict[str, Any] = {
    "apply_spec_augment": False,  # Wav2Vec2 and its like hide stretches of sound while training
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "pos_embed_shift": None,  # DINOv3 moves the grid of positions while training
    "pos_embed_jitter": None,
    "pos_embed_rescale": None,
    "enable_fusion": False,  # CLAP's is for recordings longer than the model's input, which codecs never make
}


def read_config(name: str) -> PretrainedConfig:
    """The config of all that stands under a name."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigError(
            f"tower name {name!r} is neither a folder with a config.json nor a reachable hub name of a known "
            f"architecture ({error})"
        ) from error
    return config


def without_chance(fields: dict[str, Any]) -> dict[str, Any]:
    """The same config with nothing left to chance while training: what is random about a row follows from its key."""
    still: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            still[key] = without_chance(value)
        elif isinstance(value, float) and any(word in key for word in _RATES):
            still[key] = 0.0
        else:
            still[key] = _UNCHANCED.get(key, value)
    return still


def half_config(whole: PretrainedConfig, modality: str) -> PretrainedConfig:
    """The config of what reads the modality: of a dual model its half."""
    name = f"{HALVES[modality]}_config"
    if name not in whole.sub_configs:
        return whole
    half: PretrainedConfig = getattr(whole, name)
    return half


def outline(whole: PretrainedConfig, modality: str) -> PreTrainedModel:
    """The encoder without memory (meta device); halves of dual models are known to transformers only this way."""
    with torch.device("meta"):
        model = AutoModel.from_config(whole, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return encoder_of(model, modality)


def build_encoder(pattern: PreTrainedModel) -> PreTrainedModel:
    """A fresh encoder like an outline; batch norm has fixed statistics, so that it can hold the library's weights."""
    model: PreTrainedModel = type(pattern)(pattern.config)
    replace_batch_norm(model, trained=True)
    return model


def load_encoder(model: PreTrainedModel, name: str, whole: PretrainedConfig, modality: str) -> None:
    """Fill an encoder with the weights that stand under a name."""
    try:
        found = AutoModel.from_pretrained(name, config=whole, trust_remote_code=False, dtype=torch.float32)
    except UNREADABLE as error:
        raise ConfigError(f"the weights of {name} cannot be read: {first_line(error)}") from error
    encoder = encoder_of(found, modality)
    replace_batch_norm(encoder, trained=True)
    model.load_state_dict(encoder.state_dict())


def adopt_words(model: PreTrainedModel) -> None:
    """Put our word embedding in the place of the model's, around the same weight; one that scales stays."""
    theirs = model.get_input_embeddings()
    if type(theirs) is not nn.Embedding:
        return
    ours = WordEmbedding(theirs.num_embeddings, theirs.embedding_dim, theirs.padding_idx, device="meta")
    ours.weight = theirs.weight
    model.set_input_embeddings(ours)


def encoder_of(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    """What reads the modality: of a dual model its half, of T5 and its like not the decoder."""
    half = HALVES[modality]
    if f"{half}_config" in model.config.sub_configs:
        return cast(PreTrainedModel, model.get_submodule(f"{half}_model"))
    return cast(PreTrainedModel, model.get_encoder()) if model.config.is_encoder_decoder else model
