"""Sums of softplus over a pairwise logit matrix spread over ranks: the heart of SigLIP, by ring or by gather.

Enter: each rank's rows and columns [b, D] and a bias, rows scaled. Leaves: for each own row the sum over all ranks'
columns of softplus(-z (row . column + bias)), z = 1 for its pair and -1 else, with exact gradients. No logits are kept:
the backward computes them again, tile by tile. Refuses an unknown exchange.

Ring: each block of columns visits every rank in turn and, in the backward, carries its gradient home; a rank holds two
blocks at a time. Gather: all columns at once, fewer and larger messages. Legend: b rows of this rank, W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmpretrain.core.collectives import (
    RingShift,
    gather_rows,
    rank,
    reduce_scatter_rows,
    start_ring_shift,
    world_size,
)
from mmpretrain.layers.pair_tiles import PairLogits, Tile, absence, full_precision, tile_edge

Exchange = Literal["ring", "gather"]


class PairLosses(NamedTuple):
    """What sigmoid losses need of the logits of this rank's rows; each [b]. Absent rows hold zeros."""

    losses: Tensor
    wins: Tensor
    """True where a pair's logit is above all others of its row; no gradient."""


def pair_losses(
    rows: Tensor, columns: Tensor, bias: Tensor, present: Tensor, exchange: Exchange, edge: int | None = None
) -> PairLosses:
    """Sigmoid losses of the logits rows @ columns^T + bias ([1]), where row i and column i are a pair.

    Communicates, in the backward too. Memory grows as b D (ring) or W b D (gather), plus edge^2.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns = full_precision(rows), full_precision(columns)
        bias = bias.to(rows.dtype)
        function = {"ring": _RingLosses, "gather": _GatheredLosses}[exchange]
        return PairLosses(*function.apply(rows, columns, bias, present, tile_edge(edge, rows.device)))


class _Block(NamedTuple):
    """The rows of this rank against some columns; pairs stand where row i meets column `first_row` + i."""

    logits: PairLogits
    bias: Tensor
    first_row: int

    def arguments(self) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles of -z (logit + bias), FAR_BELOW or less where a row or column is absent."""
        for tile, values in self.logits:
            values.add_(self.bias)
            diagonal = tile.diagonal(values, self.first_row)
            own = tile.own_pairs(self.first_row)
            diagonal.neg_().add_(self.logits.row_absence[own], alpha=4)
            yield tile, values

    def add_gradients(self, grad_losses: Tensor, grad_rows: Tensor, grad_columns: Tensor) -> Tensor:
        """Accumulate the gradients of rows and columns in place; returns that of the bias, [1]."""
        grad_bias = torch.zeros_like(self.bias)
        for tile, values in self.arguments():
            grad = values.sigmoid_().mul_(grad_losses[tile.rows, None])
            tile.diagonal(grad, self.first_row).neg_()
            grad_bias += grad.sum()
            self.logits.accumulate(tile, grad, grad_rows, grad_columns)
        return grad_bias


class _Tally:
    """Losses of the own rows over blocks of columns, with each pair's logit and its highest rival."""

    def __init__(self, like: Tensor) -> None:
        self.losses, self.positive = torch.zeros_like(like), torch.zeros_like(like)
        self.rival = torch.full_like(like, -torch.inf)

    def add(self, block: _Block) -> None:
        for tile, values in block.arguments():
            self.losses[tile.rows] += functional.softplus(values).sum(1)
            diagonal = tile.diagonal(values, block.first_row)
            self.positive[tile.own_pairs(block.first_row)] = -diagonal
            diagonal.fill_(-torch.inf)
            self.rival[tile.rows] = torch.maximum(self.rival[tile.rows], values.amax(1))

    def finish(self, ctx: Any) -> tuple[Tensor, Tensor]:
        wins = self.positive > self.rival
        ctx.mark_non_differentiable(wins)
        return self.losses, wins


class _GatheredLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, bias: Tensor, present: Tensor, edge: int
    ) -> tuple[Tensor, Tensor]:
        own_absence = absence(present, rows)
        logits = PairLogits(rows, gather_rows(columns), own_absence, gather_rows(own_absence), edge)
        tally = _Tally(own_absence)
        tally.add(_Block(logits, bias, _first_row(rows)))
        ctx.edge = edge
        ctx.save_for_backward(rows, logits.columns, bias, logits.row_absence, logits.column_absence)
        return tally.finish(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, columns, bias, row_absence, column_absence = ctx.saved_tensors
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            block = _Block(PairLogits(rows, columns, row_absence, column_absence, ctx.edge), bias, _first_row(rows))
            grad_bias = block.add_gradients(grads[0], grad_rows, grad_columns)
        return grad_rows, reduce_scatter_rows(grad_columns), grad_bias, None, None


class _RingLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, bias: Tensor, present: Tensor, edge: int
    ) -> tuple[Tensor, Tensor]:
        absences = gather_rows(absence(present, rows))
        ctx.edge = edge
        ctx.save_for_backward(rows, columns, bias, absences)
        tally = _Tally(_share(absences, rank()))
        for block in _visiting_blocks(rows, columns, bias, absences, edge):
            tally.add(block)
        return tally.finish(ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, columns, bias, absences = ctx.saved_tensors
        grad_rows, grad_bias = torch.zeros_like(rows), torch.zeros_like(bias)
        travelling: RingShift | None = None
        with torch.autocast(rows.device.type, enabled=False):
            for block in _visiting_blocks(rows, columns, bias, absences, ctx.edge):
                grad_columns = torch.zeros_like(columns)
                grad_bias += block.add_gradients(grads[0], grad_rows, grad_columns)
                if travelling is not None:
                    grad_columns += travelling.wait()
                travelling = start_ring_shift(grad_columns)
        assert travelling is not None, "a ring has at least one rank"
        return grad_rows, travelling.wait(), grad_bias, None, None


def _visiting_blocks(rows: Tensor, columns: Tensor, bias: Tensor, absences: Tensor, edge: int) -> Iterator[_Block]:
    """The own block of columns, then that of each previous rank; the next one travels while one is in use.

    Communicates. At visit k a rank holds the block of rank - k, so what is sent on after each visit is home after W.
    """
    no_pairs = columns.shape[0]
    for visit in range(world_size()):
        shift = start_ring_shift(columns) if visit + 1 < world_size() else None
        row_absence = _share(absences, rank())
        column_absence = _share(absences, (rank() - visit) % world_size())
        logits = PairLogits(rows, columns, row_absence, column_absence, edge)
        yield _Block(logits, bias, 0 if visit == 0 else no_pairs)
        if shift is not None:
            columns = shift.wait()


def _share(of_all: Tensor, owner: int) -> Tensor:
    return of_all.chunk(world_size())[owner]


def _first_row(rows: Tensor) -> int:
    return rank() * rows.shape[0]
