"""Late fusion: the towers meet as pooled vectors, or only where their embeddings are compared.

Enter: one pooled vector for each modality. Leaves: one vector of those a row has; tokens never meet. Legend: B rows,
M modalities, D fusion width.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import Fusion, FusionConfig
from mmpretrain.fusions.presence import mean_of_present, means_of, presence
from mmpretrain.layers.adapters import Adapter
from mmpretrain.layers.blocks import MLP
from mmpretrain.layers.initialization import BlockScales, Linear
from mmpretrain.layers.parameters import LearnedToken


class LateFusionConfig(FusionConfig):
    """No layers between the towers and the common embedding space, but for a pooled vector where one is wanted."""

    kind: Literal["late"] = "late"
    pooled: Literal["none", "mean", "concat", "gated"] = "none"
    """none: only embeddings meet; mean: over the modalities a row has; concat: side by side through an MLP, a learned
    vector standing for one that is absent; gated: weighted by a softmax over those a row has (arXiv 1702.01992)."""
    width: int = Field(512, gt=0)
    """Width of the pooled vector, where there is one."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP of concat over the width."""

    @property
    def gives_tokens(self) -> bool:
        return False

    @property
    def gives_pooled(self) -> bool:
        return self.pooled != "none"

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        kinds: dict[str, type[LateFusion]] = {"mean": LateFusion, "concat": ConcatFusion, "gated": GatedSoftmaxFusion}
        return kinds[self.pooled](self, widths) if self.gives_pooled else None


class LateFusion(Fusion):
    """The mean of the projected vectors; also what the other late fusions begin with."""

    reads: ClassVar[Literal["tokens", "pooled"]] = "pooled"

    def __init__(self, config: LateFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = config.width
        self.adapters = nn.ModuleDict({m: Adapter(width, config.width) for m, width in widths.items()})

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        streams = {m: self.adapters[m](tokens[m]) for m in self.adapters if m in tokens}
        return {"pooled": self.pool(streams, masks)}

    def pool(self, streams: TensorDict, masks: Mapping[str, Tensor | None]) -> Tensor:
        """Map {m: [B, 1, D]} to [B, D]."""
        return mean_of_present(streams, masks)


class ConcatFusion(LateFusion):
    """All vectors side by side, then an MLP."""

    def __init__(self, config: LateFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths)
        self.absent = nn.ModuleDict({m: LearnedToken(config.width, std=0.02) for m in widths})
        total = config.width * len(widths)
        self.norm = nn.LayerNorm(total)
        self.mix = Linear(total, config.width, std=total**-0.5)
        self.mlp = MLP(BlockScales(config.width, depth=1), int(config.width * config.mlp_ratio))

    def pool(self, streams: TensorDict, masks: Mapping[str, Tensor | None]) -> Tensor:
        rows = next(iter(streams.values())).shape[0]
        present = dict(zip(streams, presence(streams, masks).unbind(1), strict=True))
        columns = [self.absent[m](rows).squeeze(1) for m in self.adapters]
        for place, m in enumerate(self.adapters):
            if m in streams:
                columns[place] = torch.where(present[m][:, None], streams[m].squeeze(1), columns[place])
        mixed = self.mix(self.norm(torch.cat(columns, dim=1)))
        pooled: Tensor = mixed + self.mlp(mixed)
        return pooled


class GatedSoftmaxFusion(LateFusion):
    """Each vector scores itself; the scores of those present become weights that sum to one."""

    def __init__(self, config: LateFusionConfig, widths: Mapping[str, int]) -> None:
        super().__init__(config, widths)
        self.scores = nn.ModuleDict({m: Linear(config.width, 1, std=config.width**-0.5) for m in widths})

    def pool(self, streams: TensorDict, masks: Mapping[str, Tensor | None]) -> Tensor:
        vectors, present = means_of(streams, masks), presence(streams, masks)
        scores = torch.cat([self.scores[m](stream.squeeze(1)) for m, stream in streams.items()], dim=1)
        # A finite floor: a row without any modality gets even weights over zeros instead of NaN.
        weights = scores.float().masked_fill(~present, -1e4).softmax(dim=1).to(vectors.dtype)
        return (vectors * (weights * present).unsqueeze(-1)).sum(dim=1)
