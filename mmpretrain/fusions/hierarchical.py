"""Hierarchical fusion: the tokens of each modality become a few latents, then the latents of all modalities meet.

Legend as in `fusions/base.py`, K latents of each modality, N bottleneck tokens. Latents are read by cross-attention
(Perceiver, arXiv 2103.03206). They then meet in one sequence, or only through bottleneck tokens (MBT, 2107.00135),
whose cost grows with the modalities and not with their square. Gives a pooled vector and no tokens.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import BlocksFusionConfig, Fusion
from mmpretrain.fusions.presence import context_mask, mean_of_present, presence
from mmpretrain.layers.adapters import Adapter
from mmpretrain.layers.blocks import Block, CrossBlock
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.parameters import LearnedPositions, LearnedToken
from mmpretrain.layers.pooling import masked_mean


class HierarchicalFusionConfig(BlocksFusionConfig):
    """Tokens to latents within each modality, then blocks across modalities."""

    kind: Literal["hierarchical"] = "hierarchical"
    latents: PositiveInt = 16
    """Latents of each modality."""
    reading_depth: PositiveInt = 1
    """Blocks by which latents read their modality's tokens."""
    depth: PositiveInt = 4
    """Blocks across modalities."""
    bottlenecks: NonNegativeInt = 0
    """Tokens through which alone modalities exchange; 0: all latents attend to all."""

    @property
    def gives_tokens(self) -> bool:
        return False

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return HierarchicalFusion(self, widths)


class Reader(nn.Module):
    """The tokens of one modality into its latents; a null token keeps a row without any of them finite."""

    def __init__(self, config: HierarchicalFusionConfig, width: int, hidden: int) -> None:
        super().__init__()
        scales = BlockScales(config.width, config.reading_depth)
        self.count = config.latents
        self.adapter = Adapter(width, config.width)
        self.start, self.null = (LearnedToken(config.width, std=config.width**-0.5) for _ in range(2))
        self.places = LearnedPositions(config.latents, config.width, std=config.width**-0.5)
        self.blocks = nn.ModuleList(CrossBlock(scales, config.heads, hidden) for _ in range(config.reading_depth))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Map [B, L, D_m] to [B, K, D]; `mask` covers [null, tokens]."""
        rows = tokens.shape[0]
        latents = self.places(self.start(rows).expand(-1, self.count, -1))
        context = torch.cat([self.null(rows), self.adapter(tokens)], dim=1)
        for block in self.blocks:
            latents = block(latents, context, None, mask)
        read: Tensor = latents
        return read


class HierarchicalFusion(Fusion):
    """Readers, blocks across modalities, a norm; pooled is the mean over the modalities a row has."""

    def __init__(self, config: HierarchicalFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width, self.latents = config.width, config.latents
        scales, hidden = BlockScales(config.width, config.depth), int(config.width * config.mlp_ratio)
        self.readers = nn.ModuleDict({m: Reader(config, width, hidden) for m, width in widths.items()})
        layer = _BottleneckLayer if config.bottlenecks else _JointLayer
        self.layers = nn.ModuleList(layer(widths, scales, config.heads, hidden) for _ in range(config.depth))
        self.bottlenecks = _Bottlenecks(config.bottlenecks, config.width) if config.bottlenecks else None
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        names = [m for m in self.readers if m in tokens]
        streams = {m: self.readers[m](tokens[m], context_mask(tokens, masks, [m])) for m in names}
        present = presence({m: tokens[m] for m in names}, masks)
        rows = present.shape[0]
        shared = present.new_zeros(rows, 0, self.width, dtype=streams[names[0]].dtype)
        if self.bottlenecks is not None:
            shared = self.bottlenecks(rows)
        for layer in self.layers:
            streams, shared = layer(streams, shared, present)
        streams = {m: self.norm(stream) for m, stream in streams.items()}
        whole = {
            m: column[:, None].expand(-1, self.latents) for m, column in zip(names, present.unbind(1), strict=True)
        }
        return {"pooled": mean_of_present(streams, whole)}


class _Bottlenecks(nn.Module):
    """N learned tokens."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.start = LearnedToken(width, std=width**-0.5)
        self.places = LearnedPositions(count, width, std=width**-0.5)

    def forward(self, rows: int) -> Tensor:
        placed: Tensor = self.places(self.start(rows).expand(-1, self.count, -1))
        return placed


class _JointLayer(nn.Module):
    """One block over the latents of all modalities."""

    def __init__(self, names: Mapping[str, int], scales: BlockScales, heads: int, hidden: int) -> None:
        super().__init__()
        self.block = Block(scales, heads, hidden)

    def forward(self, streams: TensorDict, shared: Tensor, present: Tensor) -> tuple[TensorDict, Tensor]:
        counts = [stream.shape[1] for stream in streams.values()]
        mask = torch.cat(
            [column[:, None].expand(-1, n) for column, n in zip(present.unbind(1), counts, strict=True)], 1
        )
        moved = self.block(torch.cat(list(streams.values()), dim=1), mask)
        return dict(zip(streams, moved.split(counts, dim=1), strict=True)), shared


class _BottleneckLayer(nn.Module):
    """One block per modality over its latents and the bottlenecks, which then are averaged over present modalities."""

    def __init__(self, names: Mapping[str, int], scales: BlockScales, heads: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({m: Block(scales, heads, hidden) for m in names})

    def forward(self, streams: TensorDict, shared: Tensor, present: Tensor) -> tuple[TensorDict, Tensor]:
        moved = {m: self.blocks[m](torch.cat([stream, shared], dim=1)) for m, stream in streams.items()}
        split = shared.shape[1]
        told = torch.stack([stream[:, -split:] for stream in moved.values()], dim=1)
        averaged = masked_mean(told.flatten(2), present).view_as(shared)
        return {m: stream[:, :-split] for m, stream in moved.items()}, averaged
