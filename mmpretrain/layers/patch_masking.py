"""Which patches of a grid are hidden from a tower: a fixed number of each row, chosen by the row's random key.

Enter: row keys. Leave: patch numbers, visible and hidden, each row as many. Refuses nothing; configs check that some
are hidden and some seen. Legend: B rows, K visible patches, M hidden ones, S places on the last two axes of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmpretrain.layers.noise import uniform

Layout = Literal["random", "tube", "block"]

_BLOCKS = 32
"""Blocks drawn for each row; together they nearly always cover what is to be hidden, and the rest is random."""
_SHARE = (0.05, 0.25)
"""Smallest and largest block as a share of the places."""
_ASPECT = 0.3
"""Narrowest block, height over width or the other way (BEiT, arXiv 2106.08254, algorithm 1)."""


class Split(NamedTuple):
    """Patch numbers of each row in rising order: int64 [B, K] and [B, M]."""

    visible: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class PatchMasking:
    """The masking of one objective over one grid, time first."""

    layout: Layout
    """random: each patch by itself; tube: the same random places at all times (VideoMAE, arXiv 2203.12602); block:
    places in rectangles, the same at all times."""
    grid: tuple[int, ...]
    share: float
    """Part of the patches, or of the places, that is hidden."""
    stream: str
    """Name of the random stream; objectives with different names hide different patches."""

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_visible(self) -> int:
        """K."""
        return self._times * round(self._choices * (1 - self.share))

    def __call__(self, draw: Tensor) -> Split:
        """Split the patches of each row by its key, int64 [B]: those of lowest noise are visible."""
        noise = self._block_noise(draw) if self.layout == "block" else uniform(draw, self._choices, self.stream)
        order, seen = noise.argsort(dim=1, stable=True), self.num_visible // self._times
        return Split(*(self._at_all_times(part.sort(dim=1).values) for part in (order[:, :seen], order[:, seen:])))

    @property
    def _times(self) -> int:
        """Times at which the same places are hidden."""
        return 1 if self.layout == "random" else math.prod(self.grid[:-2])

    @property
    def _choices(self) -> int:
        """What is chosen from: patches, or places."""
        return self.num_patches // self._times

    def _at_all_times(self, places: Tensor) -> Tensor:
        """Map place numbers [B, N] to patch numbers [B, times N]."""
        offsets = torch.arange(self._times, device=places.device) * self._choices
        return (offsets[None, :, None] + places[:, None, :]).flatten(1)

    def _block_noise(self, draw: Tensor) -> Tensor:
        """[B, S]: the higher the earlier a block covers the place; below 1 where none does, random within a block."""
        rows, columns = (1, *self.grid)[-2:]
        share, aspect, top, left = uniform(draw, 4 * _BLOCKS, f"{self.stream}.blocks").double().chunk(4, dim=1)
        area = rows * columns * (_SHARE[0] + share * (_SHARE[1] - _SHARE[0]))
        height = (area * _ASPECT ** (2 * aspect - 1)).sqrt().round().clamp(1, rows)
        width = (area / height).round().clamp(1, columns)
        down = _inside((top * (rows - height + 1)).floor(), height, rows)
        across = _inside((left * (columns - width + 1)).floor(), width, columns)
        covered = (down[:, :, :, None] & across[:, :, None, :]).flatten(2)
        order = torch.arange(_BLOCKS, 0, -1, device=draw.device)[None, :, None]
        return (covered * order).amax(dim=1) + uniform(draw, rows * columns, self.stream).double()


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """bool [B, N, size]: lines from `start`, as many as `length`."""
    lines = torch.arange(size, device=start.device)
    return (lines >= start[:, :, None]) & (lines < (start + length)[:, :, None])
