"""The matrix of pairwise logits in tiles, so that none of the contrastive losses ever holds it whole.

Enter: rows [b, D] of this rank and columns [B, D], already scaled. Leave: one [t, t] tile of logits at a time, in full
precision, with absent rows and columns pushed so far down that their probability is exactly zero.
Legend: b rows of this rank, B columns, t edge of a tile, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpretrain.layers.kernels import kernel_device

FAR_BELOW = -1.0e4
"""Added to the logits of absent rows and columns: exp of it is 0 in fp32 and fp64, and, unlike with -inf, sums over
nothing but absent entries stay finite."""

_EDGE_CPU, _EDGE_ACCELERATOR = 1024, 4096


@dataclass(frozen=True)
class Tile:
    """Which rows and columns a tile covers."""

    rows: slice
    columns: slice

    def own_pairs(self, first_row: int) -> slice:
        """Own rows whose pair stands in this tile, where row i of this rank belongs to column `first_row` + i."""
        start = max(self.rows.start, self.columns.start - first_row)
        return slice(start, max(start, min(self.rows.stop, self.columns.stop - first_row)))

    def diagonal(self, matrix: Tensor, first_row: int) -> Tensor:
        """A view of the entries of this tile's `matrix` that belong to `own_pairs`."""
        return matrix.diagonal(first_row + self.rows.start - self.columns.start)


def tile_edge(edge: int | None, device: torch.device) -> int:
    """The wanted edge, or where none is wanted one that fills the device's caches."""
    if edge is not None:
        return edge
    return _EDGE_CPU if kernel_device(device) == "cpu" else _EDGE_ACCELERATOR


def tiles(num_rows: int, num_columns: int, edge: int) -> Iterator[Tile]:
    """Cover num_rows x num_columns, row by row of tiles."""
    for row in range(0, num_rows, edge):
        for column in range(0, num_columns, edge):
            yield Tile(slice(row, min(row + edge, num_rows)), slice(column, min(column + edge, num_columns)))


def full_precision(features: Tensor) -> Tensor:
    """fp32 from anything lower; fp64 stays."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def absence(present: Tensor, like: Tensor) -> Tensor:
    """0 for present rows, FAR_BELOW for absent ones, in the dtype of `like`."""
    return torch.zeros_like(present, dtype=like.dtype).masked_fill_(~present, FAR_BELOW)


@dataclass(frozen=True)
class PairLogits:
    """All logits rows @ columns^T + absences, by tile."""

    rows: Tensor
    columns: Tensor
    row_absence: Tensor
    column_absence: Tensor
    edge: int

    def __iter__(self) -> Iterator[tuple[Tile, Tensor]]:
        for tile in tiles(self.rows.shape[0], self.columns.shape[0], self.edge):
            absences = self.row_absence[tile.rows, None] + self.column_absence[None, tile.columns]
            yield tile, absences.addmm_(self.rows[tile.rows], self.columns[tile.columns].T)

    def accumulate(self, tile: Tile, grad: Tensor, grad_rows: Tensor, grad_columns: Tensor) -> None:
        """Add what the gradient of one tile of logits means for the rows and the columns."""
        grad_rows[tile.rows].addmm_(grad, self.columns[tile.columns])
        grad_columns[tile.columns].addmm_(grad.T, self.rows[tile.rows])
