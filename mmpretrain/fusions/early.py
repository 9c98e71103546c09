"""Early fusion: one trunk over the tokens of all modalities from the first block on (BEiT-3, arXiv 2208.10442).

Legend as in `fusions/base.py`. Give it towers of kind `stem`, whose tokens have positions and nothing else; over deep
towers it is joint fusion. The class token is never masked, so a row without any other token stays finite.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import BlocksFusionConfig, Fusion
from mmpretrain.layers.adapters import Adapter, joined_mask
from mmpretrain.layers.attention import SelfAttention
from mmpretrain.layers.blocks import MLP, CheckpointedBlock
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.parameters import LearnedToken

_SHARED = "shared"


class EarlyFusionConfig(BlocksFusionConfig):
    """Attention over all tokens in every block, with feed-forwards for all or for each modality."""

    kind: Literal["early"] = "early"
    depth: int = Field(12, gt=0)
    """Number of blocks."""
    experts: bool = False
    """Each modality has MLPs of its own, and so has the class token; false: one MLP in each block serves all."""

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return EarlyFusion(self, widths)


class EarlyFusion(Fusion):
    """Adapters that mark the modality, class token, trunk, norm; the tokens leave split by modality again."""

    def __init__(self, config: EarlyFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        scales, hidden = BlockScales(config.width, config.depth), int(config.width * config.mlp_ratio)
        experts = (_SHARED, *widths) if config.experts else (_SHARED,)
        self.experts = config.experts
        self.adapters = nn.ModuleDict({m: Adapter(width, config.width) for m, width in widths.items()})
        self.class_token = LearnedToken(config.width, std=config.width**-0.5)
        self.blocks = nn.ModuleList(TrunkBlock(scales, config.heads, hidden, experts) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.adapters if m in tokens]
        streams = {m: self.adapters[m](tokens[m]) for m in names}
        first = self.class_token(streams[names[0]].shape[0]).to(streams[names[0]].dtype)
        mask = joined_mask(tokens, masks, names)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        fused = torch.cat([first, *streams.values()], dim=1)
        lengths = {_SHARED: 1} | {m: stream.shape[1] for m, stream in streams.items()}
        stretches = lengths if self.experts else {_SHARED: fused.shape[1]}
        for block in self.blocks:
            fused = block(fused, mask, stretches)
        parts = self.norm(fused).split(list(lengths.values()), dim=1)
        return {"pooled": parts[0].squeeze(1)} | dict(zip(names, parts[1:], strict=True))


class TrunkBlock(CheckpointedBlock):
    """Attention over all tokens, then an MLP for each stretch of the sequence."""

    def __init__(self, scales: BlockScales, heads: int, hidden: int, experts: Iterable[str]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(scales.width), nn.LayerNorm(scales.width)
        self.attention = SelfAttention(heads, scales)
        self.experts = nn.ModuleDict({name: MLP(scales, hidden) for name in experts})

    def run(self, tokens: Tensor, mask: Tensor | None, stretches: Mapping[str, int]) -> Tensor:  # type: ignore[override]
        """Map tokens [B, L, D] to [B, L, D]; `stretches` are the experts and how many tokens each serves, in order."""
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        parts = self.norm2(tokens).split(list(stretches.values()), dim=1)
        fed = torch.cat([self.experts[name](part) for name, part in zip(stretches, parts, strict=True)], dim=1)
        return tokens + fed
