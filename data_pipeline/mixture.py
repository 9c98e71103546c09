"""Which source each global position draws from: a repeating slot pattern that spreads every weight as evenly as can be.

Enter: the weights of the sources, and from which position on they hold. Leave: for any position its source and how
many draws that source gave before. Refuses weights whose ratio repeats only after a very long time.

A pattern has as many slots as the weights' smallest common ratio (0.75 : 0.25 has 4). Draw j of a source with share w
may stand in the slots floor(j / w) to ceil((j + 1) / w) - 1; taking the earliest deadline first always fits where the
shares sum to one (Baruah et al., "Proportionate progress", Algorithmica 1996), so after any n positions a source has
given w * n to within one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmpretrain.core.errors import ConfigError

Int64s = NDArray[np.int64]

MAX_SLOTS = 20_000
"""Longest pattern; it bounds the memory and the time to lay it out."""


@dataclass(frozen=True)
class SlotPattern:
    """One period of the interleaving; slot s of period q stands at position q * num_slots + s."""

    source: Int64s
    """[slots] Number of the source that the slot draws from."""
    before: Int64s
    """[slots] How often that source occurs in the slots before."""
    per_period: Int64s
    """[sources] Draws of each source in one period."""

    @property
    def num_slots(self) -> int:
        return len(self.source)

    def counts(self, num_positions: int) -> Int64s:
        """[sources] Draws of each source in the first positions."""
        periods, rest = divmod(num_positions, self.num_slots)
        counted = np.bincount(self.source[:rest], minlength=len(self.per_period))
        return periods * self.per_period + counted.astype(np.int64)

    def assign(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """(source, draw) of positions counted from the pattern's begin."""
        periods, slots = np.divmod(positions, self.num_slots)
        sources = self.source[slots]
        return sources, periods * self.per_period[sources] + self.before[slots]


def lay_out(weights: Sequence[float]) -> SlotPattern:
    """The pattern of these weights; a weight of 0 gets no slot."""
    shares = integer_shares(weights)
    num_slots = sum(shares)
    used = [0] * len(shares)
    source, before = np.empty(num_slots, np.int64), np.empty(num_slots, np.int64)
    for slot in range(num_slots):
        # the next draw of each source: (deadline, source) of those that may stand here
        waiting = [
            (-(-(count + 1) * num_slots // share), number)
            for number, (share, count) in enumerate(zip(shares, used, strict=True))
            if share and count * num_slots // share <= slot
        ]
        number = min(waiting)[1]
        source[slot], before[slot] = number, used[number]
        used[number] += 1
    return SlotPattern(source, before, np.array(shares, np.int64))


def integer_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the ratio of the weights, each weight read as the decimal it prints as."""
    if not any(weights):
        raise ConfigError("the weights of the sources are all 0; give at least one source a weight above 0")
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    integers = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*integers)
    shares = [integer // divisor for integer in integers]
    if sum(shares) > MAX_SLOTS:
        rounded = ", ".join(f"{round(weight / sum(weights), 3):g}" for weight in weights)
        raise ConfigError(
            f"weights {', '.join(f'{weight:g}' for weight in weights)} repeat only after {sum(shares)} samples, more "
            f"than {MAX_SLOTS}; round them, e.g. to {rounded}"
        )
    return shares


@dataclass(frozen=True)
class Phase:
    """A pattern, from a global position on."""

    from_position: int
    pattern: SlotPattern
    drawn: Int64s
    """[sources] Draws before the phase begins."""


@dataclass(frozen=True)
class Mixture:
    """The source and draw number of every position; a pure function of the position."""

    phases: tuple[Phase, ...]

    def drawn_before(self, position: int) -> Int64s:
        """[sources] Draws of each source at all positions before this one."""
        phase = max((one for one in self.phases if one.from_position <= position), key=lambda one: one.from_position)
        return phase.drawn + phase.pattern.counts(position - phase.from_position)

    def assign(self, positions: ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, draw) of each global position; draws of a source count on through all phases."""
        wanted = np.atleast_1d(np.asarray(positions, np.int64))
        begins = np.array([phase.from_position for phase in self.phases])
        numbers = np.searchsorted(begins, wanted, side="right") - 1
        sources, draws = np.empty_like(wanted), np.empty_like(wanted)
        for number in np.unique(numbers).tolist():
            phase, rows = self.phases[number], numbers == number
            sources[rows], inside = phase.pattern.assign(wanted[rows] - phase.from_position)
            draws[rows] = phase.drawn[sources[rows]] + inside
        return sources, draws


def mixture_of(weights: Mapping[str, float], changes: Sequence[tuple[int, Mapping[str, float]]] = ()) -> Mixture:
    """A mixture of the sources in the order of `weights`; `changes` are (from_position, weights), positions rising."""
    drawn = np.zeros(len(weights), np.int64)
    phases: list[Phase] = []
    for from_position, new in ((0, weights), *changes):
        if phases:
            drawn = drawn + phases[-1].pattern.counts(from_position - phases[-1].from_position)
        phases.append(Phase(from_position, lay_out([new.get(name, 0.0) for name in weights]), drawn))
    return Mixture(tuple(phases))
