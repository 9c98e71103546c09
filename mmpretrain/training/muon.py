"""Muon for the matrices of transformer blocks, AdamW for all else, in one optimizer (Jordan et al. 2024).

Enter: parameter groups that say whether they are "orthogonal". Leave: the step of both, the same at every ZeRO stage:
where ranks hold parts of matrices, the momentum of all is gathered, each matrix made whole and orthogonalised by every
rank that holds some of it, and that rank's part taken. Refuses nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from mmpretrain.core.collectives import gather_rows, rank, world_size

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_TINY = 1e-7


@dataclass(frozen=True)
class Piece:
    """A stretch of a matrix in one rank's flat part; of length 0 where the rank holds none."""

    in_flat: int
    in_matrix: int
    length: int


@dataclass(frozen=True)
class Place:
    """Where one matrix lies in the flat parts of all ranks."""

    shape: tuple[int, int]
    pieces: tuple[Piece, ...]
    """By rank; together they are the matrix, in order."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations in bf16: [M, N]."""
    a, b, c = _COEFFICIENTS
    rounded = matrix.bfloat16()
    wide = rounded.T if matrix.shape[0] > matrix.shape[1] else rounded
    wide = wide / wide.norm().clamp(min=_TINY)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def update_of(matrix: Tensor) -> Tensor:
    """The orthogonalised matrix at the size of an AdamW update, so that learning rate and decay serve both (Liu et al.,
    arXiv 2502.16982, section 2.2)."""
    size: float = 0.2 * max(matrix.shape) ** 0.5
    return orthogonalised(matrix) * size


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups that are "orthogonal"; their momentum is kept as "exp_avg", which it is."""

    places: Mapping[Tensor, Sequence[Place]]
    """Flat part -> the matrices in it; empty where parameters are whole."""

    def __init__(self, groups: list[dict[str, object]], momentum: float = MOMENTUM, **settings: object) -> None:
        super().__init__(groups, **settings)  # type: ignore[arg-type]
        self.momentum = momentum
        self.places = {}
        for group in self.param_groups:
            group.setdefault("orthogonal", False)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Communicates where parameters are parts."""
        assert closure is None, "closures are not used here"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    self._move(parameter, group["lr"], group["weight_decay"])
        return None

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        assert parameter.grad is not None, "a parameter that took part in nothing has a gradient of zeros"
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter.data)}
        state["step"] += 1
        state["exp_avg"].lerp_(parameter.grad, 1 - self.momentum)
        ahead = parameter.grad.lerp(state["exp_avg"], self.momentum)  # Nesterov
        parameter.mul_(1 - lr * weight_decay)
        if parameter in self.places:
            self._move_part(parameter, ahead, lr)
        else:
            parameter.add_(update_of(ahead), alpha=-lr)

    def _move_part(self, part: Tensor, ahead: Tensor, lr: float) -> None:
        everyone = gather_rows(ahead.bfloat16()).view(world_size(), -1)
        for place in self.places[part]:
            own = place.pieces[rank()]
            if own.length:
                stretches = zip(everyone, place.pieces, strict=True)
                whole = torch.cat([flat[piece.in_flat : piece.in_flat + piece.length] for flat, piece in stretches])
                update = update_of(whole.view(place.shape)).flatten()[own.in_matrix : own.in_matrix + own.length]
                part[own.in_flat : own.in_flat + own.length].add_(update, alpha=-lr)
