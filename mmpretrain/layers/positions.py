"""Fixed positions that need no learning, computed from the grid alone."""

import torch
from torch import Tensor, nn


def sincos_2d(grid: int, width: int) -> Tensor:
    """Sine-cosine positions of a square grid in row order, fp32 [grid^2, width] (MAE, He et al. 2021, appendix A.1).

    The first half of the width encodes the column, the second the row; width is a multiple of 4.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line.repeat(grid, 1)
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class SinCosPositions(nn.Module):
    """Fixed two-dimensional positions, added to the tokens; no parameters and nothing saved."""

    table: Tensor

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("table", torch.empty(grid * grid, width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table.copy_(sincos_2d(self.grid, self.table.shape[1]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the grid's positions to tokens [B, grid^2, D]."""
        return tokens + self.table
