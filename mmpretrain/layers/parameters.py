"""Small modules that own one bare parameter each and use it in their own forward, where ZeRO-3 gathers it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import init

from mmpretrain.layers import products
from mmpretrain.layers.initialization import WORD_STD
from mmpretrain.layers.resampling import Grid, resample_positions


class LearnedToken(nn.Module):
    """One learned vector: a class token, a query, a mask token."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)

    def forward(self, rows: int) -> Tensor:
        """The vector for each row: [rows, 1, D], without copies."""
        return self.weight.expand(rows, 1, -1)


class ClassToken(nn.Module):
    """A learned first token with a position of its own, as in CLIP's image tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.weight.shape[0] ** -0.5
        init.normal_(self.weight, std=std)
        init.normal_(self.position, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Put the class token before tokens [B, L, D]: [B, 1 + L, D]."""
        first = (self.weight + self.position).expand(tokens.shape[0], 1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)


class LearnedPositions(nn.Module):
    """One learned vector per position, added to the tokens."""

    def __init__(self, length: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add positions 0 to L - 1 to tokens [B, L, D]."""
        return tokens + self.weight[: tokens.shape[1]]


class GridPositions(LearnedPositions):
    """One learned vector per place of a grid, resampled for a smaller one."""

    def __init__(self, grid: Grid, width: int, std: float) -> None:
        super().__init__(math.prod(grid), width, std)
        self.grid = grid

    def forward(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """Add the positions of `grid`, None: its own, to tokens [B, L, D]."""
        return tokens + resample_positions(self.weight, self.grid, grid or self.grid)


class SpaceTimePositions(nn.Module):
    """One learned vector per time and one per place, both added to the tokens, which run fastest in space."""

    def __init__(self, times: int, places: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.time = nn.Parameter(torch.empty(times, width))
        self.space = nn.Parameter(torch.empty(places, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.time, std=self.std)
        init.normal_(self.space, std=self.std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add positions to tokens [B, times places, D]."""
        return tokens + (self.time[:, None] + self.space).flatten(0, 1)


class WordEmbedding(nn.Embedding):
    """Word vectors that also score hidden states, so that a tied head is a forward of this very module."""

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=WORD_STD)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor, score: bool = False) -> Tensor:
        """Ids [...] to vectors [..., D]; with `score`, hidden states [N, D] to logits [N, vocab]."""
        return products.linear(input, self.weight) if score else super().forward(input)
