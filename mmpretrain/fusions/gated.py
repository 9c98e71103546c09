"""Gated cross-attention (Flamingo, arXiv 2204.14198, section 2.2): others are let in as training opens a gate.

Legend as in `fusions/base.py`. Every gate is tanh of a scalar that starts at zero, so at the start the tokens leave as
they came (projected, where a tower is of another width). A learned null token stands in every context, so that a row
whose other modalities are absent attends to something and stays finite.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import BlocksFusionConfig, Fusion
from mmpretrain.fusions.presence import context_mask, contexts_of, mean_of_present
from mmpretrain.layers.attention import CrossAttention
from mmpretrain.layers.blocks import MLP, CheckpointedBlock
from mmpretrain.layers.initialization import BlockScales, Linear
from mmpretrain.layers.parameters import LearnedToken


class GatedFusionConfig(BlocksFusionConfig):
    """A stream per modality into which those it attends to enter through gates."""

    kind: Literal["gated"] = "gated"
    depth: int = Field(6, gt=0)
    """Blocks per modality."""
    attend: dict[str, tuple[str, ...]] | None = None
    """Modality -> those its tokens look at, e.g. {text: [image]}; one left out looks at none.
    Null: each at all others."""

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return GatedFusion(self, widths)


class Gate(nn.Module):
    """tanh of a learned scalar (shape [1], which ZeRO can hold) that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.weight.tanh()


class GatedBlock(CheckpointedBlock):
    """Cross-attention, then MLP, each behind its gate."""

    def __init__(self, scales: BlockScales, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm_cross, self.norm_context = nn.LayerNorm(scales.width), nn.LayerNorm(scales.width)
        self.cross_attention = CrossAttention(heads, scales)
        self.norm_mlp = nn.LayerNorm(scales.width)
        self.mlp = MLP(scales, hidden)
        self.attention_gate, self.mlp_gate = Gate(), Gate()

    def run(self, tokens: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """Map tokens [B, L, D], with context [B, K, D], to [B, L, D]."""
        seen = self.cross_attention(self.norm_cross(tokens), self.norm_context(context), context_mask)
        tokens = tokens + self.attention_gate(seen)
        fed: Tensor = tokens + self.mlp_gate(self.mlp(self.norm_mlp(tokens)))
        return fed


class GatedFusion(Fusion):
    """Projections, layers of one block per modality; pooled is the mean over present modalities."""

    def __init__(self, config: GatedFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        self.contexts = contexts_of(config.attend, widths)
        scales, hidden = BlockScales(config.width, config.depth), int(config.width * config.mlp_ratio)
        self.projections = nn.ModuleDict({m: _projection(width, config.width) for m, width in widths.items()})
        self.markers = nn.ModuleDict({m: LearnedToken(config.width, std=0.02) for m in widths})
        self.null = LearnedToken(config.width, std=config.width**-0.5)
        self.layers = nn.ModuleList(_blocks(widths, scales, config.heads, hidden) for _ in range(config.depth))

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.projections if m in tokens]
        streams = {m: self.projections[m](tokens[m]) for m in names}
        rows = streams[names[0]].shape[0]
        null, markers = self.null(rows), {m: self.markers[m](rows) for m in names}
        contexts = {m: [other for other in self.contexts[m] if other in tokens] for m in names}
        context_masks = {m: context_mask(tokens, masks, contexts[m]) for m in names}
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            before = {m: stream + markers[m] for m, stream in streams.items()}
            streams = {
                m: layer[m](stream, torch.cat([null, *(before[other] for other in contexts[m])], 1), context_masks[m])
                for m, stream in streams.items()
            }
        return streams | {"pooled": mean_of_present(streams, masks)}


def _projection(width: int, fused: int) -> nn.Module:
    return nn.Identity() if width == fused else Linear(width, fused, std=width**-0.5)


def _blocks(names: Iterable[str], scales: BlockScales, heads: int, hidden: int) -> nn.ModuleDict:
    return nn.ModuleDict({m: GatedBlock(scales, heads, hidden) for m in names})
