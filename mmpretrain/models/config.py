"""The model's part of a run config: towers, the fusion over them and the width where embeddings meet.

Enter: YAML or JSON that names towers by modality. Leave: a frozen config that builds the same model anywhere.
Refused: a stem under another modality's name, an embedding of the wrong width, a fusion with nothing to join, an input
that shares a tower the model lacks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mmpretrain.core.config import Config
from mmpretrain.core.registry import kind_of, union_of
from mmpretrain.core.types import FieldSpec, TokenizerFacts
from mmpretrain.fusions.base import FusionConfig
from mmpretrain.fusions.late import LateFusionConfig
from mmpretrain.models.towers.base import TowerConfig
from mmpretrain.objectives.base import ObjectiveConfig

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
    shares: dict[str, str] = {}
    """Further input -> the tower that reads it too, with the same weights and projection, e.g. {question: text}."""
    fusion: FusionUnion = LateFusionConfig()
    """How towers meet: late (embeddings only, or pooled vectors), early and joint (one transformer over all tokens),
    cross and gated (each modality attends to others), hierarchical (latents of each modality, then across them)."""

    @model_validator(mode="after")
    def _towers_fit(self) -> "ModelConfig":
        if not self.towers:
            raise ValueError("a model needs at least one tower; add towers.image or towers.text")
        for modality, tower in self.towers.items():
            tower.check(modality)
        for name, tower_name in self.shares.items():
            if name in self.towers:
                raise ValueError(f"shares.{name} has a tower of its own; remove one of both")
            if tower_name not in self.towers:
                raise ValueError(
                    f"shares.{name} names {tower_name}, which is none of the towers {', '.join(self.towers)}"
                )
        if len(self.readers) < 2 and self.fusion.gives_pooled:
            raise ValueError("a fusion joins two inputs or more, this model has one; set fusion.kind to late")
        return self

    @property
    def readers(self) -> Mapping[str, str]:
        """Every input -> the tower that reads it; a tower's own input has its name."""
        return {modality: modality for modality in self.towers} | self.shares

    @property
    def inputs(self) -> Mapping[str, FieldSpec]:
        """Input -> shape and dtype of one row, for the codecs."""
        return {name: self.towers[tower].input_field(tower) for name, tower in self.readers.items()}

    def lacking_fusion(self, objective: ObjectiveConfig) -> str | None:
        """What the objective reads of the fusion and this one does not give, with the fix; None where all is well."""
        kind = kind_of(type(self.fusion))
        if objective.needs_fusion and not self.fusion.gives_tokens:
            return f"reads fused tokens, but model.fusion.kind is {kind}; set it to joint or cross"
        if objective.needs_pooled and not self.fusion.gives_pooled:
            return (
                f"reads the fused pooled vector, but model.fusion.kind is {kind} and pools none; set "
                "model.fusion.pooled to mean, concat or gated, or its kind to joint or cross"
            )
        return None


def resolve(config: ModelConfig, tokenizer: TokenizerFacts | None) -> ModelConfig:
    """The config with every fact of tokenizer and named weights written into it, so that it builds without them."""
    towers = {modality: tower.resolve(modality, tokenizer) for modality, tower in config.towers.items()}
    return config.model_copy(update={"towers": towers})
