"""Contrastive learning by a sigmoid for each pair (SigLIP, arXiv 2303.15343).

Enter: unit embeddings of two modalities. Leaves: the sum over this rank's rows i and all ranks' columns j of
softplus(-z_ij (s u_i . v_j + b)); its count is the number of pairs, not of entries. Rows without both modalities count
nothing and are nobody's negatives.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.layers.scale import LogitBias, LogitScale
from mmpretrain.layers.sigmoid_pairs import Exchange, pair_losses
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective
from mmpretrain.objectives.pairs import ContrastiveConfig, encode_pairs, pair_metrics, pairs_present


class SigLIP(Objective):
    """Sigmoid contrast of two modalities over all ranks."""

    spans_batch: ClassVar[bool] = True

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.pair, self.exchange, self.tile = config.single, config.implementation, config.tile
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)
        self.logit_bias = LogitBias(config.bias_init)

    def count(self, batch: TensorDict) -> Tensor:
        return pairs_present(batch, self.pair).sum(dtype=torch.float32)

    def encode(self, encoder: Encoder) -> TensorDict:
        return encode_pairs(encoder, self.pair)

    def reduce(self, parts: TensorDict) -> Tensor:
        scale, bias = self.logit_scale(), self.logit_bias()
        result = pair_losses(parts["first"] * scale, parts["second"], bias, parts["present"], self.exchange, self.tile)
        scalars = {"logit_scale": scale.detach().squeeze(), "logit_bias": bias.detach().squeeze()}
        parts |= {"wins": result.wins} | scalars
        return result.losses.sum()

    def metrics(self, parts: TensorDict) -> TensorDict:
        return pair_metrics(parts) | {name: parts[name] for name in ("logit_scale", "logit_bias")}


class SigLIPConfig(ContrastiveConfig):
    """Image-text contrast whose pairs are judged one by one."""

    kind: Literal["siglip"] = "siglip"
    implementation: Exchange = "ring"
    """How columns reach all ranks: ring (point to point, least memory) or gather (one collective)."""
    scale_init: float = Field(default=10.0, gt=0)
    """Factor on cosines at the start."""
    scale_max: float | None = Field(default=None, gt=0)
    """Bound of the factor; null: none, as published."""
    bias_init: float = -10.0
    """Offset of the logits at the start: nearly all pairs are negatives."""
    tile: int | None = Field(default=None, ge=1)
    """Edge of the logit tiles, the memory of the loss; null chooses for the device."""

    def build(self, facts: ModelFacts) -> SigLIP:
        return SigLIP(self)
