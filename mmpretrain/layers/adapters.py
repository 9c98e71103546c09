"""From towers' tokens to those of a fusion: normalised and projected where widths differ, marked by modality.

Shape legend: B rows, L_m tokens of modality m. A mask is bool, True where a token counts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmpretrain.core.types import TensorDict
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.parameters import LearnedToken


class Adapter(nn.Module):
    """LayerNorm and linear layer where widths differ, then a learned vector that tells the modality."""

    def __init__(self, width: int, fused: int) -> None:
        super().__init__()
        self.project = (
            nn.Identity()
            if width == fused
            else nn.Sequential(nn.LayerNorm(width), Linear(width, fused, std=width**-0.5))
        )
        self.marker = LearnedToken(fused, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, L, width] to [B, L, fused]."""
        adapted: Tensor = self.project(tokens)
        marked: Tensor = adapted + self.marker(tokens.shape[0])
        return marked


def joined_mask(tokens: TensorDict, masks: Mapping[str, Tensor | None], names: Sequence[str]) -> Tensor | None:
    """The masks of several modalities side by side, bool [B, sum L_m]; None when none of them has one."""
    given = [masks.get(m) for m in names]
    if all(mask is None for mask in given):
        return None
    whole = [tokens[m].new_ones(tokens[m].shape[:2], dtype=torch.bool) for m in names]
    return torch.cat([w if g is None else g for g, w in zip(given, whole, strict=True)], dim=1)
