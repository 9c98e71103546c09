"""Which sample stands at any global position of a run, and which replaces it: all that a run reads, as arithmetic.

Enter: opened sources, their mixture and the seed. Leave: (source, sample) of positions. Nothing is read for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from data_pipeline.config import MixtureConfig
from data_pipeline.mixture import Int64s, Mixture, mixture_of
from data_pipeline.order import sample_numbers, substitute
from data_pipeline.reader import Source
from mmpretrain.core.seeding import key_of


@dataclass(frozen=True)
class SampleOrder:
    """A pure function of the position."""

    sources: tuple[Source, ...]
    mixture: Mixture
    seed: int

    def samples_at(self, positions: ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, sample) that stand at global positions, before any is replaced."""
        sources, draws = self.mixture.assign(positions)
        return sources, self.samples_of(sources, draws)

    def samples_of(self, sources: Int64s, draws: Int64s) -> Int64s:
        """The sample of each draw from its source."""
        samples = np.empty_like(draws)
        for number in np.unique(sources).tolist():
            source, rows = self.sources[number], sources == number
            samples[rows] = sample_numbers(draws[rows], source.num_samples, self._key(source))
        return samples

    def replacement(self, number: int, position: int, attempt: int) -> int:
        """The sample of source `number` that stands in after so many at a position could not be used."""
        source = self.sources[number]
        return substitute(position, attempt, source.num_samples, key_of(self._key(source), "substitute"))

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source was drawn through before a position."""
        drawn = self.mixture.drawn_before(position).tolist()
        return {source.name: count / source.num_samples for source, count in zip(self.sources, drawn, strict=True)}

    def _key(self, source: Source) -> int:
        return key_of(self.seed, "source", source.name)


def order_of(train: MixtureConfig, sources: tuple[Source, ...], seed: int) -> SampleOrder:
    """The order that a config describes."""
    changes = [(change.from_sample, change.weights) for change in train.changes]
    return SampleOrder(sources, mixture_of(train.weights, changes), seed)


def data_step(step: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """The step whose data step number `step` (from 0) reads; `passed_over` holds (before step, steps left out)."""
    return step + sum(count for before, count in passed_over if before <= step)
