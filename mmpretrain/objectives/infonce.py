"""Contrastive learning with softmax over the global batch (CLIP, arXiv 2103.00020): InfoNCE.

Enter: unit embeddings of two modalities. Leaves: 1/2 [CE(row -> its pair) + CE(pair -> its row)] summed over this
rank's pairs, against all rows of all ranks. Rows without both modalities count nothing and are nobody's negatives.
Legend: b pairs of this rank, D embedding width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.layers.scale import LogitScale
from mmpretrain.layers.softmax_pairs import pair_sums
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective
from mmpretrain.objectives.pairs import ContrastiveConfig, encode_pairs, pair_metrics, pairs_present


class InfoNCE(Objective):
    """Softmax contrast of two modalities over all ranks."""

    spans_batch: ClassVar[bool] = True

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        self.pair, self.tile = config.single, config.tile
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)

    def count(self, batch: TensorDict) -> Tensor:
        return pairs_present(batch, self.pair).sum(dtype=torch.float32)

    def encode(self, encoder: Encoder) -> TensorDict:
        return encode_pairs(encoder, self.pair)

    def reduce(self, parts: TensorDict) -> Tensor:
        scale, second, present = self.logit_scale(), parts["second"], parts["present"]
        scaled = parts["first"] * scale
        sums = pair_sums(scaled, second, present, self.tile)
        parts |= {"wins": sums.wins, "logit_scale": scale.detach().squeeze()}
        losses: Tensor = 0.5 * (sums.row_lse + sums.column_lse) - (scaled * second).sum(-1)
        return losses.masked_fill(~present, 0.0).sum()

    def metrics(self, parts: TensorDict) -> TensorDict:
        return pair_metrics(parts) | {"logit_scale": parts["logit_scale"]}


class InfoNCEConfig(ContrastiveConfig):
    """Image-text contrast and its like."""

    kind: Literal["infonce"] = "infonce"
    scale_init: float = Field(default=1 / 0.07, gt=0)
    """Factor on cosines at the start (the inverse temperature)."""
    scale_max: float = Field(default=100.0, gt=0)
    """Bound of the factor; a gradient that pulls back from it always passes."""
    tile: int | None = Field(default=None, ge=1)
    """Edge of the logit tiles, the memory of the loss; null chooses for the device."""

    def build(self, facts: ModelFacts) -> InfoNCE:
        return InfoNCE(self)
