"""Log-sum-exps of the rows and columns of a pairwise logit matrix spread over ranks: the heart of InfoNCE.

Enter: each rank's rows and columns [b, D], scaled, and which are present. Leave: the log-sum-exp of each own row over
all ranks' columns and of each own column over all ranks' rows, with exact gradients. No B x B matrix is kept: the
forward saves log-sum-exps only, the backward computes the logits again, tile by tile.

One b x B pass serves both directions: a rank folds its rows into partial sums of every column, and two all-reduces of B
numbers finish them. Legend: b rows of this rank, B = W b over W ranks, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpretrain.core.collectives import (
    all_reduce_max,
    all_reduce_sum,
    gather_rows,
    rank,
    reduce_scatter_rows,
)
from mmpretrain.layers.pair_tiles import PairLogits, absence, full_precision, tile_edge


class PairSums(NamedTuple):
    """What softmax losses need of the logits of this rank's pairs; each [b]. Rows that are absent hold numbers of no
    meaning, to be masked."""

    row_lse: Tensor
    """log sum over present columns of exp(logit)."""
    column_lse: Tensor
    """log sum over present rows of all ranks of exp(logit)."""
    wins: Tensor
    """True where a pair's logit is above all others of its row; no gradient."""


def pair_sums(rows: Tensor, columns: Tensor, present: Tensor, edge: int | None = None) -> PairSums:
    """Sums over the logits rows @ columns^T of all ranks, where row i and column i are a pair.

    Communicates, in the backward too. Memory grows as b D + edge^2; `edge` None picks one for the device.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns = full_precision(rows), full_precision(columns)
        return PairSums(*_PairSums.apply(rows, columns, present, tile_edge(edge, rows.device)))


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, present: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor]:
        first_row = rank() * rows.shape[0]
        own_absence = absence(present, rows)
        logits = PairLogits(rows, gather_rows(columns), own_absence, gather_rows(own_absence), edge)
        row_sums, column_sums = _RunningSum(logits.row_absence), _RunningSum(logits.column_absence)
        positive, rival = torch.empty_like(own_absence), torch.full_like(own_absence, -torch.inf)
        for tile, values in logits:
            row_sums.fold(tile.rows, values, dim=1)
            column_sums.fold(tile.columns, values, dim=0)
            diagonal = tile.diagonal(values, first_row)
            positive[tile.own_pairs(first_row)] = diagonal
            diagonal.fill_(-torch.inf)
            rival[tile.rows] = torch.maximum(rival[tile.rows], values.amax(1))
        row_lse, column_lse = row_sums.finish(), column_sums.finish_over_ranks()
        wins = positive > rival
        ctx.edge = edge
        ctx.save_for_backward(rows, logits.columns, logits.row_absence, logits.column_absence, row_lse, column_lse)
        ctx.mark_non_differentiable(wins)
        return row_lse, column_lse[first_row : first_row + rows.shape[0]].clone(), wins

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns, row_absence, column_absence, row_lse, column_lse = ctx.saved_tensors
        grad_row_lse, grad_column_lse = grads[0], gather_rows(grads[1])
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            logits = PairLogits(rows, columns, row_absence, column_absence, ctx.edge)
            for tile, values in logits:
                by_row = torch.exp(values - row_lse[tile.rows, None]).mul_(grad_row_lse[tile.rows, None])
                by_column = values.sub_(column_lse[None, tile.columns]).exp_()
                grad = by_row.addcmul_(by_column, grad_column_lse[None, tile.columns])
                logits.accumulate(tile, grad, grad_rows, grad_columns)
        return grad_rows, reduce_scatter_rows(grad_columns), None, None


class _RunningSum:
    """Log-sum-exp over values that arrive in parts (Milakov and Gimelshein, arXiv 1805.02867)."""

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.full_like(like, -torch.inf)
        self.total = torch.zeros_like(like)

    def fold(self, where: slice, logits: Tensor, dim: int) -> None:
        """Take in the logits of one tile along `dim`."""
        before = self.peak[where]
        peak = torch.maximum(before, logits.amax(dim))
        fresh = (logits - peak.unsqueeze(dim)).exp_().sum(dim)
        self.total[where] = self.total[where] * torch.exp(before - peak) + fresh
        self.peak[where] = peak

    def finish(self) -> Tensor:
        return self.peak + self.total.log()

    def finish_over_ranks(self) -> Tensor:
        """The same over the partial sums of all ranks; communicates."""
        peak = all_reduce_max(self.peak.clone())
        return peak + all_reduce_sum(self.total * torch.exp(self.peak - peak)).log()
