"""The model's part of a run config: towers, the fusion over them and the width where embeddings meet.

Enter: YAML or JSON that names towers by modality. Leave: a frozen config that builds the same model anywhere.
Refused: a stem under another modality's name, an embedding of the wrong width, a fusion with nothing to join.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mmpretrain.core.config import Config
from mmpretrain.core.registry import union_of
from mmpretrain.core.types import FieldSpec, TokenizerFacts
from mmpretrain.fusions.base import FusionConfig
from mmpretrain.fusions.late import LateFusionConfig
from mmpretrain.models.towers.base import TowerConfig

if TYPE_CHECKING:
    TowerUnion = TowerConfig
    FusionUnion = FusionConfig
else:
    TowerUnion = union_of("mmpretrain.models.towers", TowerConfig)
    FusionUnion = union_of("mmpretrain.fusions", FusionConfig)


class ModelConfig(Config):
    """One tower per modality, their common embedding space, and how their tokens meet."""

    embed_dim: int = Field(512, gt=0)
    """Width of the common embedding space."""
    towers: dict[str, TowerUnion]
    """Modality ("image", "text") -> its tower."""
    fusion: FusionUnion = LateFusionConfig()
    """late: embeddings only; joint: one transformer over all tokens; cross: each modality attends to the others."""

    @model_validator(mode="after")
    def _towers_fit(self) -> "ModelConfig":
        if not self.towers:
            raise ValueError("a model needs at least one tower; add towers.image or towers.text")
        for modality, tower in self.towers.items():
            tower.check(modality)
        if len(self.towers) < 2 and not isinstance(self.fusion, LateFusionConfig):
            raise ValueError("a fusion joins two towers or more, this model has one; set fusion.kind to late")
        return self

    @property
    def inputs(self) -> Mapping[str, FieldSpec]:
        """Modality -> shape and dtype of one input row, for the codecs."""
        return {modality: tower.input_field(modality) for modality, tower in self.towers.items()}


def resolve(config: ModelConfig, tokenizer: TokenizerFacts | None) -> ModelConfig:
    """The config with every fact of tokenizer and named weights written into it, so that it builds without them."""
    towers = {modality: tower.resolve(modality, tokenizer) for modality, tower in config.towers.items()}
    return config.model_copy(update={"towers": towers})
