"""Parts that training, evaluation and publishing build alike from a config."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.reader import Source
from mmpretrain.config import RunConfig
from mmpretrain.core.types import Codec, FieldSpec
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.trained_parts import prepare
from mmpretrain.publishing.facts import SourceFacts

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision of a run -> dtype of matrix products in forward; parameters stay fp32."""


def build_codecs(config: RunConfig, model: ModelConfig, tokenizer: str | None) -> dict[str, Codec]:
    """One codec per tower and label, producing what the tower or the objective reads."""
    inputs = _inputs(config, model)
    return {name: codec.codec(inputs, tokenizer) for name, codec in sorted(config.data.codecs.items())}


def batch_fields(config: RunConfig, model: ModelConfig) -> dict[str, FieldSpec]:
    """What these codecs make, told without the tokenizer."""
    inputs = _inputs(config, model)
    return {name: spec for codec in config.data.codecs.values() for name, spec in codec.fields(inputs).items()}


def _inputs(config: RunConfig, model: ModelConfig) -> dict[str, FieldSpec]:
    labels = {name: spec for objective in config.objectives.values() for name, spec in objective.input_fields.items()}
    return {**model.inputs, **labels}


def model_on_meta(config: RunConfig, model: ModelConfig) -> MultimodalTransformer:
    """The run's model as it trains, without storage: what is frozen in it is marked."""
    with torch.device("meta"):
        built = MultimodalTransformer.create(model, config.objectives)
        if config.finetune is not None:
            prepare(built, config.finetune)
    built.autocast_dtype = AUTOCAST[config.precision]
    built.train()
    return built


def source_facts(sources: Sequence[Source]) -> list[SourceFacts]:
    """What a card may say of the data: counts, and a hash over the shards' names, samples and bytes."""
    return [
        SourceFacts(
            name=source.name,
            num_shards=len(source.shards),
            num_samples=source.num_samples,
            digest=hashlib.sha256(repr(_contents(source)).encode()).hexdigest()[:16],
        )
        for source in sources
    ]


def _contents(source: Source) -> list[tuple[str, int, int]]:
    counts = np.diff(source.ends, prepend=0).tolist()
    rows = zip(source.shards, counts, source.num_bytes.tolist(), strict=True)
    return [(shard.name, count, num_bytes) for shard, count, num_bytes in rows]
