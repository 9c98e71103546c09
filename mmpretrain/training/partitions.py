"""Where ZeRO lays the matrices of a parameter group in the flat parts of all ranks.

Enter: a DeepSpeed engine. Leave: the place of each matrix, by flat part, for optimizers that look at whole matrices.
This file and `fragments.py` alone know DeepSpeed 0.19.8's internals.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmpretrain.training.fragments import EngineLike, flat_groups
from mmpretrain.training.muon import Piece, Place


def matrix_places(engine: EngineLike, stage: int) -> Mapping[Tensor, Sequence[Place]]:
    """Flat part of this rank -> the matrices in it, for groups that are "orthogonal"; empty at stage 0."""
    if stage == 0:
        return {}
    place = _in_parameters if stage == 3 else _in_groups
    return {
        flat: place(engine, number, flat)
        for number, (flat, group) in enumerate(flat_groups(engine, stage))
        if group["orthogonal"]
    }


def _in_groups(engine: EngineLike, number: int, flat: Tensor) -> list[Place]:
    """Stages 1 and 2 cut the flattened group into equal parts."""
    optimizer, size = engine.optimizer, flat.numel()
    matrices = optimizer.bit16_groups[number]  # type: ignore[attr-defined]
    places = []
    for matrix, offset in zip(matrices, optimizer.round_robin_bit16_offsets[number], strict=True):  # type: ignore[attr-defined]
        pieces = []
        for first in range(0, engine.world_size * size, size):
            begin, end = max(offset, first), min(offset + matrix.numel(), first + size)
            pieces.append(Piece(begin - first, begin - offset, end - begin) if begin < end else Piece(0, 0, 0))
        places.append(Place(tuple(matrix.shape), tuple(pieces)))
    return places


def _in_parameters(engine: EngineLike, number: int, flat: Tensor) -> list[Place]:
    """Stage 3 cuts each parameter into equal parts, the last of which is padded."""
    optimizer = engine.optimizer
    places = []
    for matrix in optimizer.fp16_groups[number]:  # type: ignore[attr-defined]
        _, offset, size = optimizer.grad_position[optimizer.get_param_id(matrix)]  # type: ignore[attr-defined]
        firsts = (rank * size for rank in range(engine.world_size))
        pieces = [Piece(offset, first, max(0, min(size, matrix.ds_numel - first))) for first in firsts]
        places.append(Place(tuple(matrix.ds_shape), tuple(pieces)))
    return places
