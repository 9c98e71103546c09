"""From one step's local results to the report that every rank holds alike, in one packed collective.

Enter: the engine's result and this rank's batches. Leave: a StepReport: losses over the global batch, rates, memory,
replaced samples and what was asked from outside.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from data_pipeline.digest import halves, joined, of_halves
from mmpretrain.core.collectives import all_reduce_sum, gather_objects, rank, world_size
from mmpretrain.core.types import Batch, StepReport
from mmpretrain.training.engine import StepResult
from mmpretrain.training.ranks import on_main
from mmpretrain.training.requests import Requests
from mmpretrain.training.spikes import SCORE, SpikeMeter
from mmpretrain.training.utilization import Utilization

GIB = 2.0**30
COUNTED_AFTER = 10
"""Steps of an attempt before the model's FLOPs are counted: the first ones only warm up, and may be all of a trial."""


@dataclass(frozen=True)
class _Flags:
    """Small counts that ranks add up beside the losses."""

    skips: float
    stop: float
    save: float
    evaluate: float
    stacks: float
    written: float
    digest_high: float
    digest_low: float


@dataclass(frozen=True)
class _RankTimes:
    """Seconds of each rank, by rank, in one step."""

    waits: Sequence[float]
    """For data."""
    computes: Sequence[float]
    """Encoding, before the ranks meet: after that all take as long as the slowest."""

    def metrics(self, step_s: float) -> dict[str, float]:
        busy = [wait + compute for wait, compute in zip(self.waits, self.computes, strict=True)]
        return {
            "perf/data_s": max(self.waits),
            "perf/data_pct": 100.0 * min(1.0, max(self.waits) / step_s),
            "rank/busy_s_min": min(busy),
            "rank/busy_s_med": statistics.median(busy),
            "rank/busy_s_max": max(busy),
            "rank/slowest": float(busy.index(max(busy))),
        }


class Reporter:
    """Measures a step from outside and gathers what the ranks must agree on."""

    def __init__(
        self,
        global_batch: int,
        requests: Requests,
        trace_samples: bool,
        device: torch.device,
        count_flops: Callable[[], Utilization] = Utilization,
        has_written: Callable[[], bool] = lambda: False,
    ) -> None:
        """`count_flops` is called once, on the main rank, when the first steps are over; `has_written` after every
        step: whether this rank has written its part of a checkpoint under way."""
        self.global_batch = global_batch
        self.requests = requests
        self.trace_samples = trace_samples
        self.device = device
        self.utilization = Utilization()
        """Nothing until it was counted."""
        self._count_flops, self._has_written = count_flops, has_written
        self._reported = 0
        self.spikes = SpikeMeter()
        """What came before the step; whoever goes on from another step sets it."""
        self.epochs: Callable[[int], Mapping[str, float]] = lambda step: {}
        """How often each source was read through after so many steps; set with `spikes`."""
        self.step = 0
        """Number of the last step reported; 0 before the first."""
        self._ended = time.perf_counter()
        self._data_s = 0.0
        self._process = psutil.Process()

    def timed(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """The batches, with the time spent waiting for each remembered for the report."""
        iterator = iter(batches)
        self._ended = time.perf_counter()
        while True:
            start = time.perf_counter()
            item = next(iterator, None)
            if item is None:
                return
            self._data_s = time.perf_counter() - start
            yield item

    def forget_pause(self) -> None:
        """Leave the time since the last report (an evaluation, a save) out of the next step's rate."""
        self._ended = time.perf_counter()

    def report(self, step: int, lr: float, batches: Sequence[Batch], result: StepResult) -> StepReport:
        """The report of step number `step` (from 1). Communicates."""
        losses, times, flags = self._agree(batches, result)
        step_s = time.perf_counter() - self._ended
        self._ended = time.perf_counter()
        self.step = step
        self._reported += 1
        if self._reported == COUNTED_AFTER:
            self.utilization = on_main(self._count_flops)
        gather_keys = self.trace_samples or result.skipped
        keys = [key for batch in batches for key in batch.keys] if gather_keys else []
        skips = [skip for batch in batches for skip in batch.skips]
        return StepReport(
            step=step,
            samples=step * self.global_batch,
            metrics=self._metrics(losses, times, lr, step_s, result) | self._epochs(step),
            skipped=result.skipped,
            keys=tuple(key for part in gather_objects(keys) for key in part) if gather_keys else (),
            skips=tuple(skip for part in gather_objects(skips) for skip in part) if flags.skips else (),
            digest=of_halves(flags.digest_high, flags.digest_low),
            checkpoint_written=flags.written == world_size(),
            stop_requested=flags.stop > 0,
            save_requested=flags.save > 0,
            evaluate_requested=flags.evaluate > 0,
            stacks_requested=flags.stacks > 0,
        )

    def _agree(self, batches: Sequence[Batch], result: StepResult) -> tuple[dict[str, float], _RankTimes, _Flags]:
        names = sorted(result.losses)
        asked = self.requests
        local = [
            sum(len(batch.skips) for batch in batches),
            asked.stop(),
            asked.save(),
            asked.evaluate(),
            asked.stacks(),
            self._has_written(),
            *halves(joined(batch.digest for batch in batches)),
        ]
        times = torch.zeros(2, world_size(), dtype=torch.float64)
        times[0, rank()], times[1, rank()] = self._data_s, result.compute_s
        sums = torch.stack([result.losses[name].double() for name in names])
        numbers = torch.cat([torch.tensor(local, dtype=torch.float64), times.flatten()]).to(self.device)
        packed = all_reduce_sum(torch.cat([sums, numbers])).tolist()
        counts = torch.stack([result.counts[name] for name in names]).clamp(min=1.0).tolist()
        losses = {name: total / count for name, total, count in zip(names, packed, counts, strict=False)}
        rest = packed[len(names) :]
        waits, computes = rest[len(local) : -world_size()], rest[-world_size() :]
        return losses, _RankTimes(waits, computes), _Flags(*rest[: len(local)])

    def _epochs(self, step: int) -> dict[str, float]:
        return {f"data/epochs_{name}": epochs for name, epochs in self.epochs(step).items()}

    def _metrics(
        self, losses: Mapping[str, float], times: _RankTimes, lr: float, step_s: float, result: StepResult
    ) -> dict[str, float]:
        metrics = {f"train/loss_{name}": value for name, value in losses.items()}
        metrics["train/loss"] = math.fsum(result.weights[name] * value for name, value in losses.items())
        metrics |= {f"train/weight_{name}": result.weights[name] for name in result.scheduled}
        metrics["train/lr"] = lr
        metrics["train/grad_norm"] = result.grad_norm
        metrics["train/skipped_steps"] = float(result.skipped)
        if result.loss_scale is not None:
            metrics["train/grad_scale"] = result.loss_scale
        metrics[SCORE] = self.spikes.score(metrics)
        metrics |= {_qualified(name): value for name, value in _floats(result.metrics).items()}
        metrics["perf/step_s"] = step_s
        metrics["perf/samples_per_s"] = self.global_batch / step_s
        metrics["perf/samples_per_s_per_gpu"] = self.global_batch / step_s / world_size()
        metrics |= self.utilization.metrics(metrics["perf/samples_per_s_per_gpu"])
        metrics |= times.metrics(step_s)
        metrics["mem/host_rss_gib"] = self._process.memory_info().rss / GIB
        if self.device.type == "cuda":
            metrics["mem/max_active_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            metrics["mem/max_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        return metrics


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """All scalars in one transfer from the device."""
    if not metrics:
        return {}
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def _qualified(name: str) -> str:
    """Objectives name their metrics; those without a group belong to train/."""
    return name if "/" in name else f"train/{name}"
