"""How much of the rows of a micro-batch is more than padding, and rows of one length again where others need it.

Enter: masks, bool [B, L], True where a token counts, or tokens [B, L, D]. Leave: a number of columns; longer rows.
Refuses nothing.
"""

from torch import Tensor
from torch.nn import functional

MULTIPLE = 8
"""Lengths are multiples of this, so that kernels meet few shapes and tensor cores fill their tiles."""


def filled_columns(mask: Tensor, at_least: int = 1) -> int:
    """The columns up to the last in which some row has a token that counts, rounded up; at most L. Looks at values."""
    last = int(mask.any(dim=0).nonzero().max()) + 1 if bool(mask.any()) else 1
    return min(mask.shape[1], -(-max(last, at_least) // MULTIPLE) * MULTIPLE)


def lengthened(rows: Tensor, length: int) -> Tensor:
    """Rows [B, L, ...] with zeros (or False) behind them up to `length`."""
    missing = length - rows.shape[1]
    return rows if missing <= 0 else functional.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing))
