"""Micro-batches of any step of a run, the same for any number of ranks, workers and restarts.

Enter: the data config, the codecs and where to start. Leave: per step, the list of this rank's `Batch`es. The loader's
whole state is the step: each row follows from (seed, position). Refused: shards that cannot be read, and a source
whose samples cannot be decoded.
"""

import atexit
import hashlib
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from threading import Thread, current_thread, main_thread

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.collate import BatchRows
from data_pipeline.config import CacheConfig, DataConfig
from data_pipeline.digest import joined, row_marks, shard_mark
from data_pipeline.prefetch import fetching_ahead
from data_pipeline.reader import Place, SampleReader, Source, open_sources
from data_pipeline.sample_order import SampleOrder, data_step, order_of
from mmpretrain.core.errors import DataError, MMPretrainError, SampleError
from mmpretrain.core.ranks import BatchPlan
from mmpretrain.core.seeding import generator, key_of, row_key, sample_key
from mmpretrain.core.types import Array, Batch, Codec, Skip, TensorDict

MAX_ATTEMPTS = 32
"""Substitutes tried for one position; more in a row mean that a source is broken, not a sample."""

Wire = tuple[TensorDict, tuple[str, ...], tuple[Skip, ...], int]
"""A batch as it comes from a worker: plain containers, which PyTorch can pin."""


def build_loader(
    config: DataConfig, codecs: Mapping[str, Codec], plan: BatchPlan, seed: int, start_step: int, steps: int
) -> "Loader":
    """A loader of the steps from `start_step` (0: none is done yet) up to, without it, `steps`, the length of the run.

    Indexes shards that have no index, so let one rank build first where shards are new.
    """
    patterns = {name: source.shards for name, source in config.train.sources.items()}
    sources = open_sources(patterns, codecs, wants_all=True, cache=config.cache)
    order = order_of(config.train, sources, seed, plan.global_batch)
    rows = RowMaker(SampleReader(sources), order, dict(codecs), config.verify_checksums)
    return Loader(MicroBatches(rows, plan, steps), start_step, config.workers, config.prefetch, config.cache)


@dataclass(frozen=True)
class RowMaker:
    """The row at any global position."""

    reader: SampleReader
    order: SampleOrder
    codecs: dict[str, Codec]
    verify_checksums: bool

    def batch(self, positions: range) -> Wire:
        """The rows at these positions."""
        sources, samples = self.order.samples_at(np.array(positions))
        rows, places, skips = BatchRows(self.codecs, len(positions)), list[Place](), list[Skip]()
        for row, (position, source, sample) in enumerate(
            zip(positions, sources.tolist(), samples.tolist(), strict=True)
        ):
            place, decoded = self._row(position, source, sample, skips)
            rows.put(row, decoded)
            places.append(place)
        keys = tuple(place.full_key for place in places)
        tensors = self._facts(positions, keys) | rows.tensors(len(positions))
        return tensors, keys, tuple(skips), _digest(positions, places)

    def _row(self, position: int, number: int, sample: int, skips: list[Skip]) -> tuple[Place, dict[str, Array]]:
        """The place and fields at a position; unusable samples are noted and replaced by others of their source."""
        tried = list[int]()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            place = self.reader.find(number, sample)
            try:
                return place, self._decode(place, position)
            except SampleError as error:
                where = (place.source, place.shard, place.ordinal, place.key, position)
                skips.append(Skip(*where, str(error), repeat=tried.count(sample)))
            tried.append(sample)
            sample = self.order.replacement(number, position, attempt)
        raise DataError(
            f"source {place.source}: {MAX_ATTEMPTS} samples drawn for one row cannot be used; the last is "
            f"{skips[-1].key} in {skips[-1].shard}: {skips[-1].reason}; look at the shards with `mmpretrain data check`"
        )

    def _decode(self, place: Place, position: int) -> dict[str, Array]:
        members = place.read(self.verify_checksums).members
        draw = row_key(self.order.seed, position)
        return decode(self.codecs, members, {name: generator(key_of(draw, name)) for name in self.codecs})

    def _facts(self, positions: range, keys: Sequence[str]) -> TensorDict:
        """What is known of rows beside their fields."""
        draws = [row_key(self.order.seed, position) for position in positions]
        samples = torch.tensor([sample_key(key) for key in keys])
        return {"position": torch.tensor(positions), "draw": torch.tensor(draws), "sample": samples}


def _digest(positions: range, places: Sequence[Place]) -> int:
    """Of what was really read for these positions."""
    marks = np.array([shard_mark(place.source, place.shard_name) for place in places], np.uint64)
    ordinals = np.array([place.ordinal for place in places], np.int64)
    return joined(row_marks(np.array(positions), marks, ordinals).tolist())


def decode(
    codecs: Mapping[str, Codec], members: Mapping[str, bytes], draws: Mapping[str, np.random.Generator] | None
) -> dict[str, Array]:
    """The fields of all codecs; each modality has a stream of its own, so that none shifts another's."""
    decoded: dict[str, Array] = {}
    for name, codec in codecs.items():
        decoded |= codec.decode(members, None if draws is None else draws[name])
    return decoded


class MicroBatches(Dataset[Wire | MMPretrainError]):
    """Micro-batch number n of this rank, counted from the begin of the run."""

    def __init__(self, rows: RowMaker, plan: BatchPlan, steps: int) -> None:
        self.rows, self.plan, self.steps = rows, plan, steps

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation

    def __getitem__(self, number: int) -> Wire | MMPretrainError:
        """Errors meant for the user are returned: what DataLoader raises for a worker is wrapped in a traceback."""
        try:
            return self.rows.batch(self.plan.micro_positions(*divmod(number, self.plan.accumulation)))
        except MMPretrainError as error:
            return error


@dataclass(frozen=True)
class Loader:
    """Iterates from `start_step` to the end of the run; each iteration starts anew, with workers of its own."""

    micro_batches: MicroBatches
    start_step: int
    workers: int
    prefetch: int
    cache: CacheConfig
    passed_over: tuple[tuple[int, int], ...] = ()
    """(step, n): before step `step` (from 0) the data of n steps is left out."""

    def __iter__(self) -> Iterator[list[Batch]]:
        plan = self.micro_batches.plan
        steps = range(self.start_step, self.micro_batches.steps)
        batches = _batches(self._data_loader())
        with fetching_ahead(
            self.micro_batches.rows.order, map(self._positions, steps), plan.global_batch, self.cache
        ) as step_done:
            for _ in steps:
                yield [next(batches) for _ in range(plan.accumulation)]
                step_done()

    def from_step(self, step: int, passed_over: Sequence[tuple[int, int]] = ()) -> "Loader":
        """The same stream from another step on, with what is passed over."""
        return replace(self, start_step=step, passed_over=tuple(passed_over))

    @property
    def order(self) -> SampleOrder:
        """What the loader reads, as arithmetic."""
        return self.micro_batches.rows.order

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.order.sources

    @property
    def uneven_slots(self) -> int | None:
        """Length of a slot pattern that micro-batches do not hold whole, so that they differ by a row in what they hold
        of each source; None where all hold the same."""
        micro = self.micro_batches.plan.micro
        for phase in self.order.mixture.phases:
            if micro % phase.pattern.num_slots or phase.from_position % micro:
                return phase.pattern.num_slots
        return None

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the seed, the sources, the sizes of their shards or the mixture."""
        rows = self.micro_batches.rows
        sources = [
            (source.name, [shard.name for shard in source.shards], source.ends.tolist()) for source in self.sources
        ]
        phases = [(phase.from_position, phase.pattern.per_period.tolist()) for phase in rows.order.mixture.phases]
        told = (rows.order.seed, sources, phases, *([rows.order.groups] if rows.order.groups else []))
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def _data_loader(self) -> DataLoader[Wire | MMPretrainError]:
        accumulation = self.micro_batches.plan.accumulation
        numbers = (
            data_step(step, self.passed_over) * accumulation + index
            for step in range(self.start_step, self.micro_batches.steps)
            for index in range(accumulation)
        )
        return data_loader(self.micro_batches, numbers, self.workers, self.prefetch)

    def _positions(self, step: int) -> range:
        """What this rank reads for a step."""
        plan = self.micro_batches.plan
        first = plan.micro_positions(data_step(step, self.passed_over), 0).start
        return range(first, first + plan.rows)


def data_loader(
    dataset: Dataset[Wire | MMPretrainError], numbers: Iterable[int], workers: int, prefetch: int
) -> DataLoader[Wire | MMPretrainError]:
    """The items of these numbers in order. Workers are spawned, not forked: a copy of a process with CUDA, threads and
    sockets keeps their locks and ports; and their watch over the parent works, so that none outlives a killed rank."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_worker,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="spawn" if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # it draws a seed for its workers; the run's own stream stays untouched
    )


def _as_it_is(item: object) -> object:
    return item


def _batches(loader: DataLoader[Wire | MMPretrainError]) -> Iterator[Batch]:
    with _signals_held_back():
        items = iter(loader)
    try:
        for item in items:
            if isinstance(item, MMPretrainError):
                raise item
            tensors, keys, skips, digest = item
            yield Batch(tensors, tuple(keys), tuple(skips), digest)
    except (EOFError, ConnectionError) as error:
        if current_thread() is main_thread():  # the only one in which PyTorch sets its handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or it tells the same again, in the midst of the ending
        raise RuntimeError("DataLoader worker ended while it handed over a batch") from error
    finally:
        del items  # ends the workers at once, though a traceback may hold this frame


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside are deaf to signals, which schedulers send to every process of a job: the training
    process answers them, and its workers must go on serving until it has."""
    resource_tracker.ensure_running()  # starting it later would unblock the signals again
    job_signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, job_signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(_: int) -> None:
    """In a worker: let SIGTERM through that the training process itself sends, and end without taking Python apart,
    which aborts ("terminate called") where the thread that ships tensors is still in C++."""
    Thread(target=_exit_on_parents_word, daemon=True).start()
    atexit.register(os._exit, 0)


def _exit_on_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
