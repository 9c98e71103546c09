"""A moving average of the trained weights, of which each rank keeps what belongs to its part of the fp32 masters.

Enter: fragments of the masters. Leave: fragments of kind "average" at the same places, which checkpoints hold and
restore like the others, at any ranks and ZeRO stage. Nothing communicates.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from mmpretrain.config_engine import AverageConfig
from mmpretrain.training.fragments import Fragment


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after each step (Polyak and Juditsky 1992, with decay)."""

    def __init__(self, config: AverageConfig, fragments: Iterable[Fragment]) -> None:
        masters = [one for one in fragments if one.key == "master" and one.owned]
        self.config = config
        self.masters = [one.view for one in masters]
        self.fragments = [replace(one, key="average", view=one.view.clone()) for one in masters]
        self._averages = [one.view for one in self.fragments]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the weights after step `step`, counted from 1."""
        torch._foreach_lerp_(self._averages, self.masters, 1 - self.config.decay_at(step))
