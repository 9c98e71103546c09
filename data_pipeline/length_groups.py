"""Texts of like length side by side, so that less of a batch is padding.

Enter: what the mixture says of the positions of some neighbouring global batches, and the lengths that the indexes
tell. Leave: the same draws, which have changed places. Refused: nothing of its own.

In each such group the draws of one epoch of a source are sorted by length, equal ones by their draw, and dealt to the
positions which that source has in that epoch, batch after batch. Batches take their turns in a seeded order, so that a
batch is not short or long by where it stands. What stays: the source at each position, hence the shape of a batch; the
samples of each epoch and where it ends; the samples of a group. All is arithmetic on (seed, position) and indexes.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.index import load_or_build_index
from data_pipeline.mixture import Int64s
from data_pipeline.order import locate, permute
from data_pipeline.reader import Source


@dataclass(frozen=True)
class LengthGroups:
    """How positions are grouped."""

    global_batch: int
    batches: int
    """Global batches of a group."""

    @property
    def positions(self) -> int:
        """Of one group."""
        return self.global_batch * self.batches

    def deal(self, sources: Int64s, epochs: Int64s, draws: Int64s, lengths: Int64s, key: int) -> Int64s:
        """The draws of one group in their new places; each array is [positions], in the order of the positions."""
        numbers = np.arange(self.batches)
        turns = permute(numbers, np.full_like(numbers, self.batches), np.full(self.batches, key, np.uint64))
        places = np.arange(self.positions)
        in_turn = np.lexsort((places, turns[places // self.global_batch], epochs, sources))
        by_length = np.lexsort((draws, lengths, epochs, sources))
        dealt = np.empty_like(draws)
        dealt[in_turn] = draws[by_length]
        return dealt


def characters_of(source: Source, samples: Int64s) -> Int64s:
    """Characters of the longest caption of each sample, from the indexes of their shards; 0 for those without text."""
    shards, ordinals = locate(samples, source.ends)
    characters = np.empty_like(samples)
    for shard in np.unique(shards).tolist():
        rows = shards == shard
        characters[rows] = load_or_build_index(source.shards[shard]).facts.characters[ordinals[rows]]
    return characters
