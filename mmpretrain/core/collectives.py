"""Collectives that also work without a process group, where they are the identity.

Every function here communicates when there is more than one rank: all ranks call it, in the same order.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

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


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, in place where there are several; carries no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def reduce_scatter_rows(rows: Tensor) -> Tensor:
    """Map [W b, ...] on each rank to [b, ...]: the sum over ranks of this rank's share; carries no gradient."""
    if world_size() == 1:
        return rows
    share = rows.new_empty(rows.shape[0] // world_size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(share, rows.contiguous())
    return share


class _GatherRows(torch.autograd.Function):
    """Concatenate rows of all ranks; backward sums over ranks the gradient of each rank's own rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return reduce_scatter_rows(grads[0])


def gather_rows(rows: Tensor) -> Tensor:
    """Map [b, ...] on each rank to [W b, ...] in rank order on all; differentiable."""
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _SelectRows(torch.autograd.Function):
    """Rows of any rank; the backward brings each row's gradient home. One rank's share travels at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.share = rows.shape[0]
        selected = rows.new_empty(numbers.shape[0], *rows.shape[1:])
        for owner in range(world_size()):
            block = (
                rows.contiguous() if owner == rank() else torch.empty_like(rows, memory_format=torch.contiguous_format)
            )
            dist.broadcast(block, src=owner)
            mine = numbers // ctx.share == owner
            selected[mine] = block[numbers[mine] % ctx.share]
        return selected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (numbers,), grad = ctx.saved_tensors, grads[0]
        own = grad.new_zeros(ctx.share, *grad.shape[1:])
        for owner in range(world_size()):
            mine = numbers // ctx.share == owner
            part = torch.zeros_like(own).index_add_(0, numbers[mine] % ctx.share, grad[mine])
            dist.reduce(part, dst=owner)
            if owner == rank():
                own = part
        return own, None


def select_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """`gather_rows(rows)[numbers]` without ever holding the rows of more than one other rank; differentiable.

    `rows` [b, ...] has the same b on every rank; `numbers`, int64 [n], count from 0 to W b and differ between ranks.
    """
    if world_size() == 1:
        return rows[numbers]
    selected: Tensor = _SelectRows.apply(rows, numbers)
    return selected


@dataclass(frozen=True)
class RingShift:
    """A tensor on its way from the previous rank of the ring, sent on to the next one at the same time."""

    sent: Tensor
    """Held so that its memory lives until the transfer ends."""
    received: Tensor
    transfers: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """The tensor of the previous rank, once it is here."""
        for transfer in self.transfers:
            transfer.wait()
        return self.received


def start_ring_shift(tensor: Tensor) -> RingShift:
    """Start sending `tensor` to rank + 1 while receiving that of rank - 1, in point-to-point messages; no gradient."""
    if world_size() == 1:
        return RingShift(tensor, tensor, ())
    sent, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
    following, previous = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    transfers = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, previous)]
    )
    return RingShift(sent, received, tuple(transfers))


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
