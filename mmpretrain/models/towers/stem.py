"""A tower without blocks: the tokens of a stem as they are, for a fusion that is the trunk (early fusion).

Enter: what the stem reads. Leave: its tokens with their positions, and the mean over those that count. Refused: a stem
of another modality. Legend as in `models/towers/base.py`.
"""

from typing import Literal, Self

from pydantic import Field
from torch import Tensor

from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.padding import filled_columns
from mmpretrain.layers.pooling import masked_mean
from mmpretrain.modalities.base import PatchStem, WordStem
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.models.towers.native import StemUnion, stem_facts
from mmpretrain.objectives.base import TowerFacts


class StemTowerConfig(TowerConfig):
    """A stem alone."""

    kind: Literal["stem"] = "stem"
    stem: StemUnion
    """How inputs become tokens."""
    width: int = Field(768, gt=0)
    """Width of the tokens."""

    def check(self, modality: str) -> None:
        if self.stem.modality != modality:
            raise ValueError(f"tower {modality!r} has a stem for {self.stem.modality!r}; rename the tower or its stem")

    @property
    def changes_grid(self) -> bool:
        return self.stem.last_phase > 0

    @property
    def last_phase(self) -> int:
        return self.stem.last_phase

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        if tokenizer is None:
            return self
        return self.model_copy(update={"stem": self.stem.with_tokenizer(tokenizer)})

    def input_field(self, modality: str) -> FieldSpec:
        return self.stem.input_field

    def build(self, modality: str) -> "StemTower":
        return StemTower(self)


class StemTower(Tower):
    """Tokens as the stem makes them."""

    def __init__(self, config: StemTowerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.stem = config.stem.build(config.width)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        tokens = self.stem(inputs)
        mask = None if mask is None else self.stem.token_mask(mask)
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            mask = None if mask is None else mask.gather(1, keep)
        outputs = {"tokens": tokens, "pooled": masked_mean(tokens, mask)}
        return outputs if mask is None else outputs | {"mask": mask}

    def columns(self, inputs: Tensor, mask: Tensor) -> int:
        return filled_columns(mask) if isinstance(self.stem, WordStem) else inputs.shape[1]

    def facts(self) -> TowerFacts:
        return stem_facts(self.stem, self.width)

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        return self.stem.score(hidden) if isinstance(self.stem, WordStem) else super().vocabulary_logits(hidden)

    def patches(self, inputs: Tensor) -> Tensor:
        return self.stem.patchify(inputs) if isinstance(self.stem, PatchStem) else super().patches(inputs)
