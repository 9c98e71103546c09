"""Cross-attention fusion: each modality's tokens look at the tokens of all others, layer by layer.

Legend as in `fusions/base.py`. A learned null token stands in every context, so that a row whose other modalities are
absent attends to something and stays finite.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import BlocksFusionConfig, Fusion
from mmpretrain.fusions.presence import context_mask, contexts_of, mean_of_present
from mmpretrain.layers.adapters import Adapter
from mmpretrain.layers.blocks import CrossBlock
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.parameters import LearnedToken


class CrossFusionConfig(BlocksFusionConfig):
    """A stream of blocks per modality, each attending to the streams of the others."""

    kind: Literal["cross"] = "cross"
    depth: int = Field(6, gt=0)
    """Blocks per modality."""
    attend: dict[str, tuple[str, ...]] | None = None
    """Modality -> those its tokens look at, e.g. {text: [image]}; one left out looks at none.
    Null: each at all others."""

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return CrossFusion(self, widths)


class CrossFusion(Fusion):
    """Adapters, one stream of blocks per modality, a norm per stream; pooled is the mean over present modalities."""

    def __init__(self, config: CrossFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        scales, hidden = BlockScales(config.width, config.depth), int(config.width * config.mlp_ratio)
        self.contexts = contexts_of(config.attend, widths)
        self.adapters = nn.ModuleDict({m: Adapter(width, config.width) for m, width in widths.items()})
        self.null = LearnedToken(config.width, std=config.width**-0.5)
        self.layers = nn.ModuleList(_Layer(widths, scales, config.heads, hidden) for _ in range(config.depth))
        self.norms = nn.ModuleDict({m: nn.LayerNorm(config.width) for m in widths})

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.adapters if m in tokens]
        streams = {m: self.adapters[m](tokens[m]) for m in names}
        contexts = {m: [other for other in self.contexts[m] if other in tokens] for m in names}
        context_masks = {m: context_mask(tokens, masks, contexts[m]) for m in names}
        null = self.null(streams[names[0]].shape[0])
        for layer in self.layers:
            streams = layer(streams, null, contexts, masks, context_masks)
        streams = {m: self.norms[m](streams[m]) for m in names}
        return streams | {"pooled": mean_of_present(streams, masks)}


class _Layer(nn.Module):
    """One block per modality; all read the streams as the layer before left them."""

    def __init__(self, names: Iterable[str], scales: BlockScales, heads: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({m: CrossBlock(scales, heads, hidden) for m in names})

    def forward(
        self,
        streams: TensorDict,
        null: Tensor,
        contexts: Mapping[str, list[str]],
        masks: Mapping[str, Tensor | None],
        context_masks: Mapping[str, Tensor | None],
    ) -> TensorDict:
        moved = {}
        for m, stream in streams.items():
            context = torch.cat([null, *(streams[other] for other in contexts[m])], dim=1)
            moved[m] = self.blocks[m](stream, context, masks.get(m), context_masks[m])
        return moved
