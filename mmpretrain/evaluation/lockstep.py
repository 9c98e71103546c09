"""Uneven parts on several ranks, walked in step: as many turns and collectives on each rank.

Enter: what this rank holds, of any length, also none. Leave: turns with None where this rank has run out, or all ranks'
rows in rank order. Everything here communicates.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum, gather_objects, gather_rows, rank, world_size

ItemT = TypeVar("ItemT")


def in_step(items: Iterator[ItemT], device: torch.device) -> Iterator[ItemT | None]:
    """Yield this rank's items, then None for as long as another rank still has some."""
    while True:
        item = next(items, None)
        busy = torch.tensor(float(item is not None), device=device)
        if all_reduce_sum(busy).item() == 0:
            return
        yield item


def lengths(count: int) -> list[int]:
    """Every rank's count, in rank order."""
    return gather_objects(count)


def gather_ragged(rows: Tensor) -> Tensor:
    """Concatenate [n_r, ...] over ranks of unequal n_r, in rank order."""
    if world_size() == 1:
        return rows
    sizes = lengths(len(rows))
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    every = gather_rows(padded)
    return torch.cat([every[r * max(sizes) : r * max(sizes) + size] for r, size in enumerate(sizes)])


def first_index(count: int) -> int:
    """The global index of this rank's first item when ranks hold `count` each, in rank order."""
    return sum(lengths(count)[: rank()])
