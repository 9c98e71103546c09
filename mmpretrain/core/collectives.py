"""Collectives that also work without a process group, where they are the identity.

Every function here communicates when there is more than one rank: all ranks call it, in the same order.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ItemT = TypeVar("ItemT")


def world_size() -> int:
    """Number of ranks; 1 without a process group. Does not communicate."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank. Does not communicate."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place where there are several; carries no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _GatherRows(torch.autograd.Function):
    """Concatenate rows of all ranks; backward sums over ranks the gradient of each rank's own rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Map [b, ...] on each rank to [W b, ...] in rank order on all; differentiable."""
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def gather_objects(item: ItemT) -> list[ItemT]:
    """Every rank's item, in rank order, on every rank; the items are pickled, so never from a stranger."""
    if world_size() == 1:
        return [item]
    items: list[ItemT] = [item] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
