"""A shard in an object store, read in ranges through the cache of this node.

Enter: its URL and, for samples, its index. Leave: the index from beside it, its bytes, or one sample, compared with the
checksum of the index. Refused: a store that stays away. A sample whose bytes stay wrong is a SampleError.

What is fetched and kept is a chunk, the neighbouring samples that the order of samples (order.py) keeps in one window:
all of them are read within that window, so no byte is fetched twice in an epoch, and none that is not read soon. Whole
shards would be fetched for a chunk's sake, up to 256 of them at once. Chunks of large samples are cut by bytes.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np

from data_pipeline.array_file import fault_in
from data_pipeline.cache import DiskCache
from data_pipeline.config import CacheConfig
from data_pipeline.index_file import INDEX_MAGIC
from data_pipeline.order import CHUNK_SAMPLES
from data_pipeline.stores import AbsentObject, DamagedContent, Patience, read_range, read_whole, size_of
from mmpretrain.core.errors import SampleError

if TYPE_CHECKING:
    from data_pipeline.index import ShardIndex

PART_BYTES = 32 << 20
"""Most bytes of one request, but for a sample that is larger by itself."""


@dataclass(frozen=True)
class RemoteShard:
    """A tar in an object store; what a Path is to a local one."""

    url: str
    cache: CacheConfig = field(default_factory=CacheConfig)
    index_version: str = ""
    """Changes with its index where the store or a collection file tells."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> str:
        return self.url.rpartition("/")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """Host and folders, then the name."""
        split = urlsplit(self.url)
        return (split.netloc, *split.path.strip("/").split("/"))

    @property
    def index_url(self) -> str:
        return f"{self.url}.index"


Shard = Path | RemoteShard


def patience_of(cache: CacheConfig) -> Patience:
    return Patience(cache.attempts, cache.timeout_s)


def disk_cache(cache: CacheConfig) -> DiskCache:
    return DiskCache(cache.place, cache.limit_bytes)


@contextmanager
def cached_index(shard: RemoteShard) -> Iterator[Path | None]:
    """The shard's index file, fetched from beside it or saved here before; None where there is none."""
    cache, key = disk_cache(shard.cache), _index_key(shard)
    while True:
        try:
            cache.ensure(key, partial(_fetch_index, shard))
        except AbsentObject:
            yield None
            return
        with cache.held(key) as file:
            if file is not None:
                yield cache.path_of(key)
                return


def keep_index(shard: RemoteShard, content: bytes) -> None:
    """Put an index made here in place of what the cache holds."""
    cache, key = disk_cache(shard.cache), _index_key(shard)
    cache.drop(key)
    cache.ensure(key, lambda: content)


def fetch_indexes(shards: list[RemoteShard]) -> None:
    """See that the indexes of many shards are in the cache, several at a time."""
    if not shards:
        return

    def fetch(shard: RemoteShard) -> None:
        with cached_index(shard):
            pass

    with _threads(shards[0].cache.downloads) as pool:
        for _ in pool.map(fetch, shards):
            pass


@contextmanager
def downloaded(shard: RemoteShard) -> Iterator[IO[bytes]]:
    """The whole shard in a nameless file of the cache folder, by one pass over it."""
    patience = patience_of(shard.cache)
    size = size_of(shard.url, patience)
    shard.cache.place.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=shard.cache.place) as file:
        os.ftruncate(file.fileno(), size)

        def fetch(start: int) -> None:
            os.pwrite(file.fileno(), read_range(shard.url, start, min(PART_BYTES, size - start), patience), start)

        with _threads(shard.cache.downloads) as pool:
            for _ in pool.map(fetch, range(0, size, PART_BYTES)):
                pass
        yield file


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_index(shard: RemoteShard) -> bytes:
    return read_whole(shard.index_url, patience_of(shard.cache), lambda content: fault_in(content, INDEX_MAGIC))


def _index_key(shard: RemoteShard) -> str:
    return hashlib.sha256(repr(("index", shard.url, shard.index_version)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Part:
    """The samples [first, end) of a shard, which are fetched by one request."""

    first: int
    end: int


class RemoteFile:
    """The samples of a remote shard; threads may share it."""

    def __init__(self, shard: RemoteShard, index: "ShardIndex", number: int) -> None:
        """`number`: that of the shard's first sample in its source, which says where chunks begin."""
        self.shard, self.index, self._number = shard, index, number
        self._cache = disk_cache(shard.cache)
        self._patience = patience_of(shard.cache)
        self._damaged: set[int] = set()

    def read(self, ordinal: int, verify_checksum: bool = True) -> bytes:
        """The bytes of a sample's range; they are compared with the index in any case."""
        part = self.part_of(ordinal)
        offset, length = self.index.sample_range(ordinal)
        key, begin = self._key(part), int(self.index.offset[part.first])
        while ordinal not in self._damaged:
            content, fetched = self._cache.read(key, self._fetch(part), offset - begin, length)
            if zlib.crc32(content) == self.index.crc32(ordinal):
                return content
            if fetched:  # the store was asked again and again; the part's other samples may do
                self._damaged.add(ordinal)
            else:
                self._cache.drop(key)
        raise SampleError("its bytes differ from the checksum in the shard's index, however often they are fetched")

    def part_of(self, ordinal: int) -> Part:
        if self.shard.cache.part == "sample":
            return Part(ordinal, ordinal + 1)
        chunk = (self._number + ordinal) // CHUNK_SAMPLES
        first = max(0, chunk * CHUNK_SAMPLES - self._number)
        end = min(self.index.num_samples, (chunk + 1) * CHUNK_SAMPLES - self._number)
        blocks = (self.index.offset[first:end] - self.index.offset[first]) // PART_BYTES
        bounds = first + np.searchsorted(blocks, (blocks[ordinal - first], blocks[ordinal - first] + 1))
        return Part(int(bounds[0]), int(bounds[1]))

    def ensure(self, part: Part) -> None:
        """Fetch a part unless the cache holds it."""
        self._cache.ensure(self._key(part), self._fetch(part))

    def close(self) -> None:
        """Nothing stays open."""

    def _fetch(self, part: Part) -> Callable[[], bytes]:
        return partial(fetch_part, self.shard.url, self.index, part, self._patience)

    def _key(self, part: Part) -> str:
        """Another one where the index says other bytes, so that what a changed shard held is never met again."""
        checksums = self.index.checksum[part.first : part.end].tobytes()
        return hashlib.sha256(repr((self.shard.url, part.first, checksums)).encode()).hexdigest()[:32]


def fetch_part(url: str, index: "ShardIndex", part: Part, patience: Patience) -> bytes:
    """The bytes of a part; samples that stay damaged come with it, and each is refused where it is read."""
    ranges = [index.sample_range(ordinal) for ordinal in range(part.first, part.end)]
    start, end = ranges[0][0], sum(ranges[-1])

    def fault(content: bytes) -> str | None:
        view = memoryview(content)
        for ordinal, (offset, length) in zip(range(part.first, part.end), ranges, strict=True):
            if zlib.crc32(view[offset - start : offset - start + length]) != index.crc32(ordinal):
                return f"sample {index.key(ordinal)!r} differs from its checksum"
        return None

    try:
        return read_range(url, start, end - start, patience, fault)
    except DamagedContent as error:
        return error.content
