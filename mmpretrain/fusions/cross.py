"""Cross-attention fusion: each modality's tokens look at the tokens of all others, layer by layer.

Legend as in `fusions/base.py`. A learned null token stands in every context, so that a row whose other modalities are
absent attends to something and stays finite.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import Fusion, FusionConfig
from mmpretrain.layers.adapters import Adapter, joined_mask
from mmpretrain.layers.blocks import CrossBlock
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.parameters import LearnedToken
from mmpretrain.layers.pooling import masked_mean


class CrossFusionConfig(FusionConfig):
    """A stream of blocks per modality, each attending to the streams of the others."""

    kind: Literal["cross"] = "cross"
    width: int = Field(768, gt=0)
    """Width of the fused tokens; towers of another width are projected."""
    depth: int = Field(6, gt=0)
    """Blocks per modality."""
    heads: int = Field(12, gt=0)
    """Attention heads; they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLPs over the width."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "CrossFusionConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return CrossFusion(self, widths)


class CrossFusion(Fusion):
    """Adapters, one stream of blocks per modality, a norm per stream; pooled is the mean over present modalities."""

    def __init__(self, config: CrossFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        scales, hidden = BlockScales(config.width, config.depth), int(config.width * config.mlp_ratio)
        self.adapters = nn.ModuleDict({m: Adapter(width, config.width) for m, width in widths.items()})
        self.null = LearnedToken(config.width, std=config.width**-0.5)
        self.layers = nn.ModuleList(_Layer(widths, scales, config.heads, hidden) for _ in range(config.depth))
        self.norms = nn.ModuleDict({m: nn.LayerNorm(config.width) for m in widths})

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.adapters if m in tokens]
        streams = {m: self.adapters[m](tokens[m]) for m in names}
        context_masks = {m: _context_mask(tokens, masks, _others(names, m)) for m in names}
        null = self.null(streams[names[0]].shape[0])
        for layer in self.layers:
            streams = layer(streams, null, masks, context_masks)
        streams = {m: self.norms[m](streams[m]) for m in names}
        return streams | {"pooled": _mean_of_present(streams, masks)}


class _Layer(nn.Module):
    """One block per modality; all read the streams as the layer before left them."""

    def __init__(self, names: Iterable[str], scales: BlockScales, heads: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({m: CrossBlock(scales, heads, hidden) for m in names})

    def forward(
        self,
        streams: TensorDict,
        null: Tensor,
        masks: Mapping[str, Tensor | None],
        context_masks: Mapping[str, Tensor | None],
    ) -> TensorDict:
        moved = {}
        for m, stream in streams.items():
            context = torch.cat([null, *(streams[other] for other in _others(streams, m))], dim=1)
            moved[m] = self.blocks[m](stream, context, masks.get(m), context_masks[m])
        return moved


def _others(names: Iterable[str], one: str) -> list[str]:
    return [name for name in names if name != one]


def _context_mask(tokens: TensorDict, masks: Mapping[str, Tensor | None], others: list[str]) -> Tensor | None:
    """Mask of [null, tokens of the others], or None."""
    mask = joined_mask(tokens, masks, others)
    return None if mask is None else F.pad(mask, (1, 0), value=True)


def _mean_of_present(streams: TensorDict, masks: Mapping[str, Tensor | None]) -> Tensor:
    """Mean over the modalities a row has of the mean over their tokens, [B, D]; zero for a row with none."""
    means = torch.stack([masked_mean(stream, masks.get(m)) for m, stream in streams.items()], dim=1)
    present = means.new_ones(means.shape[:2])
    for column, m in enumerate(streams):
        mask = masks.get(m)
        if mask is not None:
            present[:, column] = mask.any(dim=1).to(present.dtype)
    return (means * present.unsqueeze(-1)).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)
