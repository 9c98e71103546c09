"""What became of every sample of every set in every epoch, proven against what the ranks consumed.

Enter: the order of samples, the digest that each surviving step left of what all ranks read for it, the skips, and the
steps whose data was passed over. Leave: an `Account`: each (shard, ordinal) seen, skipped with its reason, still to
come, lost or repeated. Refused: nothing; `faults_of` says what is wrong.

The order says what a step should have read; its digest says whether it did. So nothing is written down for a sample,
and ranks, workers and attempts merge by themselves: digests add up over ranks, and an attempt that goes back to a
checkpoint takes back the steps past it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.digest import row_marks, shard_mark
from data_pipeline.mixture import Int64s
from data_pipeline.order import UInt64s, locate
from data_pipeline.reader import Source
from data_pipeline.sample_order import SampleOrder, data_step
from mmpretrain.core.types import Skip

BLOCK_SAMPLES = 1 << 18
"""Positions looked at together."""
NAMED = 5
"""Ranges of samples, or steps, that a message names."""


@dataclass(frozen=True)
class Consumed:
    """What one step left."""

    step: int
    """From 1, as in metrics.jsonl."""
    digest: int


@dataclass(frozen=True)
class Range:
    """Samples [first, last] of a shard."""

    shard: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.shard} {self.first}" + (f" to {self.last}" if self.last > self.first else "")


@dataclass(frozen=True)
class Epoch:
    """One epoch of one set."""

    source: str
    number: int
    """From 0."""
    samples: int
    """Of the set."""
    seen: int
    skipped: int
    """Unusable, so that another sample of the set was read once more, or passed over."""
    to_come: int
    lost: tuple[Range, ...]
    repeated: tuple[Range, ...]


@dataclass(frozen=True)
class Account:
    """Of a whole run."""

    steps: int
    """Steps that survive."""
    samples: int
    """Consumed by them."""
    epochs: tuple[Epoch, ...]
    """By source, then number."""
    reasons: Mapping[str, int]
    """Why samples were skipped."""
    missing: tuple[int, ...]
    """Steps that left no digest, though later ones did."""
    doubled: tuple[int, ...]
    """Steps that left two."""
    differing: tuple[int, ...]
    """Steps whose ranks read something else than the order says."""


def take_account(
    order: SampleOrder,
    global_batch: int,
    consumed: Sequence[Consumed],
    skips: Iterable[Skip] = (),
    passed_over: Sequence[tuple[int, int]] = (),
) -> Account:
    """Go through all positions once, in arrays; `passed_over` as the loader takes it."""
    last = max((one.step for one in consumed), default=0)
    times = Counter(one.step for one in consumed)
    digests = {one.step: one.digest for one in consumed}
    steps = _steps_of_data(last, passed_over)
    exceptions = _Exceptions(order, skips)
    books = [_Book(source) for source in order.sources]
    differing: list[int] = []
    stride = max(1, BLOCK_SAMPLES // global_batch)
    for begin in range(0, len(steps), stride):
        block_steps = steps[begin : begin + stride]
        rows = _rows_at(order, begin * global_batch, len(block_steps) * global_batch)
        skipped, marks = exceptions.applied(rows, np.repeat(block_steps > 0, global_batch))
        expected = marks.reshape(-1, global_batch).sum(axis=1, dtype=np.uint64)
        counts = np.array([times[step] for step in block_steps.tolist()], np.int64)
        for row, step in enumerate(block_steps.tolist()):
            if counts[row] and digests[step] != int(expected[row]):
                differing.append(step)
                counts[row] = 0
        counts[block_steps == 0] = _PASSED_OVER
        for number, book in enumerate(books):
            book.enter(rows, rows.sources == number, np.repeat(counts, global_batch), skipped)
    reasons = Counter(exceptions.reasons)
    if passed := int((steps == 0).sum()):
        reasons["passed over, because the loss rose there"] = passed * global_batch
    return Account(
        steps=last,
        samples=last * global_batch,
        epochs=tuple(epoch for book in books for epoch in book.closed()),
        reasons=dict(reasons),
        missing=tuple(step for step in range(1, last + 1) if not times[step]),
        doubled=tuple(sorted(step for step, count in times.items() if count > 1)),
        differing=tuple(differing),
    )


def faults_of(account: Account) -> list[str]:
    """What is lost, repeated or other than predicted, in words; empty for a run that lost and repeated nothing."""
    faults = []
    for steps, what in (
        (account.missing, "left no word of what they consumed"),
        (account.doubled, "are recorded twice"),
        (account.differing, "consumed something else than the order of samples says"),
    ):
        if steps:
            faults.append(f"steps {_some(steps)} {what}")
    for epoch in account.epochs:
        for ranges, what in ((epoch.lost, "lost"), (epoch.repeated, "repeated")):
            if ranges:
                count = sum(one.last - one.first + 1 for one in ranges)
                faults.append(f"set {epoch.source}, epoch {epoch.number}: {count} samples {what}: {_some(ranges)}")
    return faults


def _some(things: Sequence[object]) -> str:
    more = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(str(thing) for thing in things[:NAMED]) + more


_PASSED_OVER = -1


def _steps_of_data(last: int, passed_over: Sequence[tuple[int, int]]) -> Int64s:
    """[data steps] Number, from 1, of the step that reads the data of each; 0 where it was passed over."""
    read_by = [data_step(step, passed_over) for step in range(last)]
    steps = np.zeros(read_by[-1] + 1 if read_by else 0, np.int64)
    steps[read_by] = np.arange(1, last + 1)
    return steps


@dataclass(frozen=True)
class _Rows:
    """What the order says of neighbouring positions; each array is [rows]."""

    positions: Int64s
    sources: Int64s
    draws: Int64s
    samples: Int64s


def _rows_at(order: SampleOrder, first: int, count: int) -> _Rows:
    positions = np.arange(first, first + count)
    sources, draws = order.assign(positions)
    return _Rows(positions, sources, draws, order.samples_of(sources, draws))


class _Exceptions:
    """Positions at which another sample was read than the first that the order names."""

    def __init__(self, order: SampleOrder, skips: Iterable[Skip]) -> None:
        self._order = order
        self._skips: dict[int, list[Skip]] = {}
        for skip in skips:
            self._skips.setdefault(skip.position, []).append(skip)
        self._shard_marks = [
            np.array([shard_mark(source.name, name) for name in source.names], np.uint64) for source in order.sources
        ]
        self._positions = sorted(self._skips)
        self.reasons: Counter[str] = Counter()

    def applied(self, rows: _Rows, is_read: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], UInt64s]:
        """[rows] whether the first sample was skipped, and the mark of what was read."""
        skipped, read = np.zeros(len(rows.positions), np.bool_), rows.samples.copy()
        first = int(rows.positions[0])
        begin, end = (bisect_left(self._positions, edge) for edge in (first, first + len(read)))
        for position in self._positions[begin:end]:
            row = position - first
            if is_read[row]:
                skips = self._skips[position]
                skipped[row] = True
                read[row] = self._order.replacement(int(rows.sources[row]), position, len(skips))
                self.reasons[skips[0].reason] += 1
        return skipped, self._marks(rows, read)

    def _marks(self, rows: _Rows, samples: Int64s) -> UInt64s:
        marks = np.empty(len(samples), np.uint64)
        for number, source in enumerate(self._order.sources):
            mine = rows.sources == number
            shards, ordinals = locate(samples[mine], source.ends)
            marks[mine] = row_marks(rows.positions[mine], self._shard_marks[number][shards], ordinals)
        return marks


class _Book:
    """The epochs of one source, in order; it holds one byte a sample, for the epoch that is open."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._epochs: list[Epoch] = []
        self._open(0)

    def enter(self, rows: _Rows, mine: NDArray[np.bool_], counts: Int64s, skipped: NDArray[np.bool_]) -> None:
        """What became of rows of this source: `counts` says how often each was consumed, -1 where passed over."""
        size = self._source.num_samples
        numbers, samples = rows.draws[mine] // size, rows.samples[mine]
        counts, skipped = counts[mine], skipped[mine]
        for number in np.unique(numbers).tolist():
            if number > self._number:
                self._close()
                self._open(number)
            chosen = numbers == number
            self._add(samples[chosen], counts[chosen], skipped[chosen])

    def closed(self) -> list[Epoch]:
        """All epochs that were begun."""
        if self._drawn:
            self._close()
            self._open(self._number + 1)
        return self._epochs

    def _open(self, number: int) -> None:
        self._number, self._drawn, self._seen, self._skipped = number, 0, 0, 0
        self._times = np.zeros(self._source.num_samples, np.uint8)
        self._lost: list[Int64s] = []

    def _add(self, samples: Int64s, counts: Int64s, skipped: NDArray[np.bool_]) -> None:
        np.add.at(self._times, samples, np.minimum(np.abs(counts), 2).astype(np.uint8))
        self._lost.append(samples[counts == 0])
        self._drawn += len(samples)
        self._seen += int(((counts > 0) & ~skipped).sum())
        self._skipped += int(((counts < 0) | ((counts > 0) & skipped)).sum())

    def _close(self) -> None:
        size = self._source.num_samples
        lost = np.flatnonzero(self._times == 0) if self._drawn >= size else np.unique(np.concatenate(self._lost))
        self._epochs.append(
            Epoch(
                source=self._source.name,
                number=self._number,
                samples=size,
                seen=self._seen,
                skipped=self._skipped,
                to_come=max(0, size - self._drawn),
                lost=self._ranges(lost),
                repeated=self._ranges(np.flatnonzero(self._times > 1)),
            )
        )

    def _ranges(self, samples: Int64s) -> tuple[Range, ...]:
        """Neighbours of one shard together."""
        if not len(samples):
            return ()
        shards, ordinals = locate(samples, self._source.ends)
        begins = np.flatnonzero((np.diff(samples, prepend=samples[0] - 2) > 1) | (np.diff(shards, prepend=-1) > 0))
        ends = np.append(begins[1:], len(samples)) - 1
        return tuple(
            Range(str(self._source.shards[shard]), first, last)
            for shard, first, last in zip(
                shards[begins].tolist(), ordinals[begins].tolist(), ordinals[ends].tolist(), strict=True
            )
        )
