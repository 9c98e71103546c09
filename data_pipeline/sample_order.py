"""Which sample stands at any global position of a run, and which replaces it: all that a run reads, as arithmetic.

Enter: opened sources, their mixture and the seed. Leave: (source, sample) of positions. Nothing is read for it, but for
indexes where texts of like length are to stand together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from data_pipeline.config import MixtureConfig
from data_pipeline.length_groups import LengthGroups, characters_of
from data_pipeline.mixture import Int64s, Mixture, mixture_of
from data_pipeline.order import sample_numbers, substitute
from data_pipeline.reader import Source
from mmpretrain.core.seeding import key_of

_KEPT_GROUPS = 4


@dataclass(frozen=True)
class SampleOrder:
    """A pure function of the position."""

    sources: tuple[Source, ...]
    mixture: Mixture
    seed: int
    groups: LengthGroups | None = None
    """None: samples stand where they are drawn."""
    _dealt: dict[int, tuple[Int64s, Int64s]] = field(default_factory=dict, compare=False, repr=False)
    """The groups last asked for; what reads and what fetches ahead may be in different ones."""

    def samples_at(self, positions: ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, sample) that stand at global positions, before any is replaced."""
        sources, draws = self.assign(positions)
        return sources, self.samples_of(sources, draws)

    def assign(self, positions: ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, draw from it) that stand at global positions."""
        if self.groups is None:
            return self.mixture.assign(positions)
        numbers, places = np.divmod(np.atleast_1d(np.asarray(positions, np.int64)), self.groups.positions)
        sources, draws = np.empty_like(numbers), np.empty_like(numbers)
        for number in np.unique(numbers).tolist():
            rows = numbers == number
            of_group = self._group(number, self.groups)
            sources[rows], draws[rows] = (column[places[rows]] for column in of_group)
        return sources, draws

    def _group(self, number: int, groups: LengthGroups) -> tuple[Int64s, Int64s]:
        """(source, draw) of all positions of a group."""
        found = self._dealt.get(number)
        if found is None:
            sources, draws = self.mixture.assign(np.arange(groups.positions) + number * groups.positions)
            epochs = draws // np.array([source.num_samples for source in self.sources])[sources]
            lengths, samples = np.empty_like(draws), self.samples_of(sources, draws)
            for one in np.unique(sources).tolist():
                rows = sources == one
                lengths[rows] = characters_of(self.sources[one], samples[rows])
            found = sources, groups.deal(sources, epochs, draws, lengths, key_of(self.seed, "lengths", number))
            if len(self._dealt) >= _KEPT_GROUPS:
                self._dealt.pop(min(self._dealt), None)
            self._dealt[number] = found
        return found

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


def order_of(train: MixtureConfig, sources: tuple[Source, ...], seed: int, global_batch: int) -> SampleOrder:
    """The order that a config describes."""
    changes = [(change.from_sample, change.weights) for change in train.changes]
    groups = LengthGroups(global_batch, train.batches_by_length) if train.batches_by_length > 1 else None
    return SampleOrder(sources, mixture_of(train.weights, changes), seed, groups)


def data_step(step: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """The step whose data step number `step` (from 0) reads; `passed_over` holds (before step, steps left out)."""
    return step + sum(count for before, count in passed_over if before <= step)
