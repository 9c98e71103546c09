"""The weight of an objective in the total loss: a number, or points between which it runs straight.

Enter: a config and the number of steps done. Leaves: the weight of the next step, a pure function of both, so that
nothing of it needs saving. Refuses points that do not follow each other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

from mmpretrain.layers.phases import Moment, in_order


class WeightPoint(Moment):
    """What an objective weighs in one step; before the first point and after the last the weight stays."""

    weight: float
    """Factor of the objective in the total loss; two points at neighbouring steps make a jump."""


WeightPoints = Annotated[tuple[WeightPoint, ...], Field(min_length=1), AfterValidator(in_order)]
Weight = float | WeightPoints


def weight_at(weight: Weight, step: int) -> float:
    """The weight of step `step`, counted from 0: linear between two points."""
    if isinstance(weight, float):
        return weight
    if step <= weight[0].from_step:
        return weight[0].weight
    for earlier, later in pairwise(weight):
        if step < later.from_step:
            share = (step - earlier.from_step) / (later.from_step - earlier.from_step)
            return earlier.weight + share * (later.weight - earlier.weight)
    return weight[-1].weight
