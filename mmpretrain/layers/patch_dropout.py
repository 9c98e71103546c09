"""A training tower sees a fixed number of patches of each row, the rest are left out (FLIP, arXiv 2212.00794).

Enter: row keys, the number of patches, and which of them count. Leave: the numbers of those to keep, as many in each
row, chosen by the row's key alone; all of them in evaluation. Refused: shares that leave no patch.
Legend: B rows, L patches, K kept ones.
"""

from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from mmpretrain.layers.noise import keep_lowest, uniform
from mmpretrain.layers.phases import Moment, Phased, from_the_start, phase_at

Share = Annotated[float, Field(ge=0, lt=1)]


class DropPhase(Moment):
    """What is left out from a step on."""

    share: Share
    """Part of the patches that is left out; 0: none."""


DropPhases = Annotated[tuple[DropPhase, ...], Field(min_length=1), AfterValidator(from_the_start)]
DropSchedule = Share | DropPhases


class PatchDropout(Phased):
    """The choice of one tower."""

    def __init__(self, schedule: DropSchedule, stream: str) -> None:
        """`stream` names the random stream; towers with different names leave out different patches."""
        super().__init__()
        self.phases = (DropPhase(from_step=0, share=schedule),) if isinstance(schedule, float) else schedule
        self.stream = stream
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        self.share = phase_at(self.phases, step).share

    def forward(self, draw: Tensor | None, num_patches: int, counts: Tensor | None = None) -> Tensor | None:
        """Map row keys, int64 [B], to the patches to keep, int64 [B, K] in rising order; None: all of them.

        Of patches of which some are padding (`counts`, bool [B, L], False), padding is left out first.
        """
        if draw is None or not self.training or not self.share:
            return None
        noise = uniform(draw, num_patches, self.stream)
        if counts is not None:
            noise = noise + (~counts).to(noise.dtype)
        return keep_lowest(noise, max(1, round(num_patches * (1 - self.share))))
