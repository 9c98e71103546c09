"""Fetching what the coming steps will read from object stores, before they read it.

Enter: the positions of each coming step of this rank. Leave: the parts of shards that hold them, in the cache of the
node. Which sample stands at a position is arithmetic, so that nothing is guessed and nothing depends on what was
fetched. Nothing is refused here: what cannot be fetched is refused by the step that reads it.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from threading import Condition, Thread

import numpy as np

from data_pipeline.config import CacheConfig
from data_pipeline.order import CHUNK_SAMPLES, WINDOW_CHUNKS, locate
from data_pipeline.reader import SampleReader, Source
from data_pipeline.remote import Part, RemoteFile, RemoteShard
from data_pipeline.sample_order import SampleOrder
from mmpretrain.core.errors import DataError

_LOG = logging.getLogger(__name__)
_REMEMBERED = 4 * WINDOW_CHUNKS
"""Parts last asked for, which are not asked for again."""
_LIVE_WINDOWS = 2
"""Windows of a source whose parts are wanted at the same time: the one being read and the one being fetched."""


class Ahead:
    """Threads that fetch; they follow the steps at a distance of some steps."""

    def __init__(self, order: SampleOrder, steps: Iterable[range], distance: int, downloads: int) -> None:
        self._order, self._steps, self._distance = order, steps, distance
        self._reader = SampleReader(order.sources)
        self._queue: Queue[tuple[RemoteFile, Part] | None] = Queue(3 * downloads)
        self._recent: OrderedDict[tuple[int, int, Part], None] = OrderedDict()
        self._moved = Condition()
        self._done, self._stopped = 0, False
        for target in (self._plan, *[self._fetch] * downloads):
            Thread(target=target, daemon=True).start()

    def step_done(self) -> None:
        with self._moved:
            self._done += 1
            self._moved.notify_all()

    def stop(self) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)

    def _plan(self) -> None:
        for number, positions in enumerate(self._steps):
            self._wait_for(number)
            try:
                for wanted in self._parts_of(positions):
                    self._put(wanted)
            except DataError as error:
                _LOG.info("fetching ahead of the step failed: %s", error)  # the step refuses it
            if self._stopped:
                return

    def _wait_for(self, number: int) -> None:
        """Until this step lies no further ahead than it should."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or number <= self._done + self._distance)

    def _parts_of(self, positions: range) -> Iterator[tuple[RemoteFile, Part]]:
        """The parts that hold the samples at some positions, each at most once in a while."""
        sources, samples = self._order.samples_at(np.arange(positions.start, positions.stop))
        for source in np.unique(sources).tolist():
            shards, ordinals = locate(samples[sources == source], self._reader.sources[source].ends)
            for shard, ordinal in zip(shards.tolist(), ordinals.tolist(), strict=True):
                file = self._reader.file_at(source, shard)
                if isinstance(file, RemoteFile):
                    part = file.part_of(ordinal)
                    if not self._asked_lately(source, shard, part):
                        yield file, part

    def _asked_lately(self, source: int, shard: int, part: Part) -> bool:
        key = (source, shard, part)
        known = key in self._recent
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)
        return known

    def _put(self, wanted: tuple[RemoteFile, Part]) -> None:
        while not self._stopped:
            try:
                self._queue.put(wanted, timeout=0.2)
            except Full:
                continue
            return

    def _fetch(self) -> None:
        while True:
            wanted = self._queue.get()
            if wanted is None or self._stopped:
                self._queue.put(None)  # for the next thread
                return
            try:
                wanted[0].ensure(wanted[1])
            except DataError as error:
                _LOG.info("fetching ahead of the step failed: %s", error)  # the step refuses it


@contextmanager
def fetching_ahead(
    order: SampleOrder, steps: Iterable[range], global_batch: int, cache: CacheConfig
) -> Iterator[Callable[[], None]]:
    """Fetch for `steps` as far ahead as the config says; gives what is to be called after each step."""
    remote = [source for source in order.sources if any(isinstance(one, RemoteShard) for one in source.shards)]
    if remote:
        _warn_of_small_cache(remote, cache)
    distance = -(-cache.ahead // global_batch)  # whole steps; 0 for none alone
    if not remote or not distance:
        yield lambda: None
        return
    ahead = Ahead(order, steps, distance, cache.downloads)
    try:
        yield ahead.step_done
    finally:
        ahead.stop()


def _warn_of_small_cache(sources: Iterable[Source], cache: CacheConfig) -> None:
    """A cache that cannot hold what is read at the same time fetches it again and again."""
    window = CHUNK_SAMPLES * WINDOW_CHUNKS
    shares = [(min(window * _LIVE_WINDOWS, source.num_samples), source) for source in sources]
    wanted = sum(int(source.num_bytes.sum()) * samples // source.num_samples for samples, source in shares)
    if cache.part == "chunk" and wanted > cache.limit_bytes:
        _LOG.warning(
            "data.cache.limit %s is less than the %.1f GB that are read from object stores at the same time, so parts "
            "are fetched again and again; raise it, or set data.cache.part to sample",
            cache.limit,
            wanted / 1e9,
        )
