"""Joint fusion: one transformer over the tokens of all modalities and a class token.

Legend as in `fusions/base.py`. The class token is never masked, so a row without any other token stays finite.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import BlocksFusionConfig, Fusion
from mmpretrain.layers.adapters import Adapter, joined_mask
from mmpretrain.layers.blocks import Transformer
from mmpretrain.layers.parameters import LearnedToken


class JointFusionConfig(BlocksFusionConfig):
    """Self-attention over the concatenated tokens."""

    kind: Literal["joint"] = "joint"
    depth: int = Field(6, gt=0)
    """Number of blocks."""

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return JointFusion(self, widths)


class JointFusion(Fusion):
    """Adapters, class token, blocks, norm; the tokens leave split by modality again."""

    def __init__(self, config: JointFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        self.adapters = nn.ModuleDict({m: Adapter(width, config.width) for m, width in widths.items()})
        self.class_token = LearnedToken(config.width, std=config.width**-0.5)
        self.transformer = Transformer(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.adapters if m in tokens]
        adapted = [self.adapters[m](tokens[m]) for m in names]
        first = self.class_token(adapted[0].shape[0]).to(adapted[0].dtype)
        mask = joined_mask(tokens, masks, names)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        fused = self.norm(self.transformer(torch.cat([first, *adapted], dim=1), mask))
        parts = fused.split([1, *(tokens[m].shape[1] for m in names)], dim=1)
        return {"pooled": parts[0].squeeze(1)} | dict(zip(names, parts[1:], strict=True))
