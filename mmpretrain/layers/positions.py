"""Fixed positions that need no learning, computed from the grid alone."""

import math

import torch
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.layers.resampling import Grid, resample_positions

_SHARES = {1: (1.0,), 2: (1 / 2, 1 / 2), 3: (3 / 8, 3 / 8, 1 / 4)}
"""Parts of the width for each number of axes, the last axis first: of video, time gets a quarter."""
_MULTIPLES = {1: 2, 2: 4, 3: 16}


def sincos(grid: tuple[int, ...], width: int) -> Tensor:
    """Sine-cosine positions of a grid of 1 to 3 axes, its last running fastest, fp32 [product of the grid, width].

    Of two axes, the first half of the width encodes the column, the second the row (MAE, He et al. 2021, appendix A.1);
    of three, time comes last.
    """
    parts = [int(width * share) for share in _SHARES[len(grid)]]
    if sum(parts) != width or any(part % 2 for part in parts):
        raise ConfigError(
            f"width {width} cannot hold fixed positions of a grid {list(grid)}; choose a multiple of "
            f"{_MULTIPLES[len(grid)]}"
        )
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).view(-1, len(grid))
    return torch.cat([_line(axis, part) for axis, part in zip(places.unbind(1)[::-1], parts, strict=True)], 1).float()


def _line(places: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of places [L] at falling frequencies: [L, width]."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = places[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SinCosPositions(nn.Module):
    """Fixed positions in a grid of 1 to 3 axes, added to the tokens; no parameters and nothing saved."""

    table: Tensor

    def __init__(self, grid: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("table", torch.empty(math.prod(grid), width), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table.copy_(sincos(self.grid, self.table.shape[1]))

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """Add the positions of its grid, or those resampled for another one, to tokens [B, L, D]."""
        return tokens + resample_positions(self.table, self.grid, grid or self.grid)
