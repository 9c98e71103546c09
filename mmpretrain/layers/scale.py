"""The learnable temperature of contrastive losses, kept as a logarithm and bounded from above.

Enter: the initial factor and its bound. Leaves: the factor, fp32 [1]. Refuses nothing; the configs that build one check
their numbers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class _BoundedAbove(torch.autograd.Function):
    """min(value, bound) whose gradient vanishes only where descent would push further past the bound.

    A plain clamp has no gradient at all past the bound, so a value that overshoots there stays for good.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(value >= bound)
        return value.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (at_bound,) = ctx.saved_tensors
        grad = grads[0]
        return torch.where(at_bound & (grad < 0), torch.zeros_like(grad), grad), None


def bounded_above(value: Tensor, bound: float) -> Tensor:
    """min(value, bound); gradients that would raise a value at or past the bound are zero, all others pass."""
    bounded: Tensor = _BoundedAbove.apply(value, bound)
    return bounded


class LogitScale(nn.Module):
    """exp of a learnable logarithm of shape [1] (ZeRO cannot hold 0-dim parameters), at most `maximum`."""

    def __init__(self, initial: float, maximum: float | None) -> None:
        super().__init__()
        self.initial = initial
        self.log_bound = None if maximum is None else math.log(maximum)
        self.log = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log, math.log(self.initial))

    def forward(self) -> Tensor:
        log = self.log.to(torch.promote_types(self.log.dtype, torch.float32))
        return (log if self.log_bound is None else bounded_above(log, self.log_bound)).exp()


class LogitBias(nn.Module):
    """A learnable offset of shape [1] added to every logit."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.value = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.value, self.initial)

    def forward(self) -> Tensor:
        return self.value.to(torch.promote_types(self.value.dtype, torch.float32))
