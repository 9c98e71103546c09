"""Hard negatives from the global batch: for each row a column of another sample, the likelier the more alike they are.

Enter: each rank's rows and columns [b, D], who is present, which sample each row is, and the rows' random keys. Leave:
numbers of columns among those of all ranks. A draw follows from the row's key alone, so it is the same however the
batch is divided. Refuses nothing; a row with no other sample to choose says so. Legend: b rows, B columns, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmpretrain.core.collectives import gather_rows, rank
from mmpretrain.layers.noise import uniform
from mmpretrain.layers.pair_tiles import PairLogits, absence, full_precision, tile_edge


class Negatives(NamedTuple):
    """What each row of this rank drew."""

    numbers: Tensor
    """int64 [b]: columns counted over all ranks; its own number for a row that found none."""
    found: Tensor
    """bool [b]: False for absent rows and where every present column belongs to the row's own sample."""


class Rows(NamedTuple):
    """What is known of the rows of this rank, each [b]."""

    present: Tensor
    sample: Tensor
    draw: Tensor


@torch.no_grad()
def draw_negatives(rows: Tensor, columns: Tensor, known: Rows, stream: str, edge: int | None = None) -> Negatives:
    """Draw one column for each row in proportion to exp(row . column) over present columns of other samples.

    The largest of logits with Gumbel noise is such a draw (Maddison et al., arXiv 1411.0030). Communicates.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns = full_precision(rows), full_precision(columns)
        edge = tile_edge(edge, rows.device)
        own_absence = absence(known.present, rows)
        logits = PairLogits(rows, gather_rows(columns), own_absence, gather_rows(own_absence), edge)
        samples, present = gather_rows(known.sample), gather_rows(known.present.long()).bool()
        best = torch.full_like(own_absence, -torch.inf)
        numbers = torch.arange(len(rows), device=rows.device) + rank() * len(rows)
        for tile, values in logits:
            allowed = (known.sample[tile.rows, None] != samples[None, tile.columns]) & present[None, tile.columns]
            noise = _gumbel(known.draw[tile.rows], tile.columns, stream).to(values.dtype)
            value, place = (values + noise).masked_fill(~allowed, -torch.inf).max(dim=1)
            better = value > best[tile.rows]
            best[tile.rows] = torch.where(better, value, best[tile.rows])
            numbers[tile.rows] = torch.where(better, place + tile.columns.start, numbers[tile.rows])
    return Negatives(numbers, known.present & (best > -torch.inf))


def _gumbel(draw: Tensor, columns: slice, stream: str) -> Tensor:
    """-log(-log(u)), fp64 [b, columns], u in the middle of the 2^24 intervals so that it is neither 0 nor 1."""
    noise = uniform(draw, columns.stop - columns.start, stream, columns.start).double()
    return -(-(noise + 2.0**-25).log()).log()
