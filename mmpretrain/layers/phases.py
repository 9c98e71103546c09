"""Settings that change at given steps: phases, each of which lasts until the next begins.

Enter: phases by rising step. Leave: the one in force in a step, a pure function of both, so that nothing of it needs
saving. Refused: phases that do not follow each other, and first ones that begin after the first step.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from pydantic import NonNegativeInt
from torch import nn

from mmpretrain.core.config import Config


class Moment(Config):
    """Something that holds from a step on; subclasses say what."""

    from_step: NonNegativeInt
    """Steps done before the first one this is for; the first step of a run has 0."""


MomentT = TypeVar("MomentT", bound=Moment)


def in_order(moments: tuple[MomentT, ...]) -> tuple[MomentT, ...]:
    """The moments as they are; ValueError when they do not rise."""
    for earlier, later in pairwise(moments):
        if later.from_step <= earlier.from_step:
            raise ValueError(
                f"from_step {later.from_step} does not come after {earlier.from_step}; list the points in the order "
                "of their steps, each step once"
            )
    return moments


def from_the_start(phases: tuple[MomentT, ...]) -> tuple[MomentT, ...]:
    """The phases as they are; ValueError when they do not rise, or say nothing of the first steps."""
    if phases and phases[0].from_step:
        raise ValueError(
            f"the first phase begins with from_step {phases[0].from_step}, so nothing is said of the steps before; "
            "begin with from_step 0"
        )
    return in_order(phases)


def phase_at(phases: Sequence[MomentT], step: int) -> MomentT:
    """The phase in force in step `step`, counted from 0."""
    return [phase for phase in phases if phase.from_step <= step][-1]


class Phased(nn.Module):
    """A module that does something else from some step on."""

    def begin_step(self, step: int) -> None:
        """Called before step `step` of a run, counted from 0, on every rank alike."""
        raise NotImplementedError
