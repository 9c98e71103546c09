"""How long the messages of a step take.

Enter: the collectives of a step, and the bus bandwidth that was measured at some message sizes. Leave: seconds, by
interpolation between the two sizes beside each; a line fitted through all sizes (a latency and one bandwidth) is wrong
by 30 to 75 %, as bandwidth rises in steps where algorithms change. Refuses nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from mmpretrain.planning.memory import WORD, Setting, chunks_of
from mmpretrain.planning.recorder import Collective
from mmpretrain.planning.workload import Workload


@dataclass(frozen=True)
class Bandwidth:
    """Bus bandwidth at message sizes in rising order, in bytes and bytes/s."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def at(self, size: float) -> float:
        """Below the smallest size a message takes as long as that; above the largest the bandwidth stays."""
        if size <= self.sizes[0]:
            return self.rates[0] * size / self.sizes[0]
        if size >= self.sizes[-1]:
            return self.rates[-1]
        place = bisect_right(self.sizes, size)
        (low, high), (slow, fast) = self.sizes[place - 1 : place + 1], self.rates[place - 1 : place + 1]
        share = math.log(size / low) / math.log(high / low)
        return float(slow * (fast / slow) ** share)


@dataclass(frozen=True)
class Network:
    """What collectives reach between the same ranks."""

    all_reduce: Bandwidth
    all_gather: Bandwidth
    """Of broadcasts and of messages from rank to rank as well."""
    reduce_scatter: Bandwidth

    def seconds(self, message: Collective, ranks: int) -> float:
        """Of one collective: the bytes that cross each rank's link (nccl-tests, PERFORMANCE.md) over the bandwidth."""
        if ranks == 1 or not message.bytes:
            return 0.0
        bandwidth = {"all_reduce": self.all_reduce, "reduce_scatter": self.reduce_scatter}.get(
            message.kind, self.all_gather
        )
        return crossings(message.kind, ranks) * message.bytes / bandwidth.at(message.bytes)


def crossings(kind: str, ranks: int) -> float:
    """How often the bytes of a collective cross each rank's link."""
    factors = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks}
    return factors.get("all_gather" if kind == "reduce_scatter" else kind, 1.0)


@dataclass(frozen=True)
class Message:
    """A collective of a step, and what it is for."""

    purpose: str
    """"gradients", "weights" or "features"."""
    collective: Collective
    count: float
    hidden: bool
    """It runs while the backward goes on."""


def messages(workload: Workload, setting: Setting) -> Iterator[Message]:
    """All of one step."""
    backwards = 1 if workload.spans_batch else chunks_of(workload, setting)
    for collective, count in workload.joining.collectives.items():
        if collective.kind != "recv":  # received while another is sent
            yield Message("features", collective, count * backwards, hidden=False)
    yield from _gradient_messages(workload, setting, backwards)
    yield from _weight_messages(workload, setting)


def _gradient_messages(workload: Workload, setting: Setting, backwards: int) -> Iterator[Message]:
    """Summed at every backward from stage 2 on, else once; up to stage 2 by all-reduce, of which each keeps its share
    (DeepSpeed's `use_multi_rank_bucket_allreduce`). The last bucket is full when the backward has ended."""
    kind = "reduce_scatter" if setting.stage == 3 else "all_reduce"
    times = backwards if setting.stage >= 2 else 1
    whole, rest = divmod(workload.parameters.trained, setting.reduce_bucket)
    buckets = [setting.reduce_bucket] * whole + [rest] * bool(rest)
    for number, size in enumerate(buckets, start=1):
        hidden = setting.overlap and number < len(buckets)
        yield Message("gradients", Collective(kind, WORD * size), times, hidden)


def _weight_messages(workload: Workload, setting: Setting) -> Iterator[Message]:
    """Gathered after the update; at stage 3 before their use, and again where they were let go in between."""
    size = WORD * (workload.parameters.total if setting.stage == 3 else workload.parameters.trained)
    if setting.stage in (1, 2):
        yield Message("weights", Collective("all_gather", size), 1, hidden=False)
    if setting.stage == 3:
        at_once = min(WORD * setting.prefetch, size)
        passes = 1 + (2 * chunks_of(workload, setting) - 1) * max(0.0, 1 - WORD * setting.reuse_distance / 2 / size)
        yield Message("weights", Collective("all_gather", int(at_once)), passes * size / at_once, setting.overlap)
