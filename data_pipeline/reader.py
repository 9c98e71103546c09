"""One sample of a shard by one read, found through the shard's index.

Enter: the patterns of a source, then (source, sample number). Leave: its place and name, and when asked its members.
Refused: shards that are missing, cut off or without pairs, as a DataError; bytes that differ from their checksum, as a
SampleError.

Indexes are read when their shard is first drawn from; what a run must know of all shards comes from the collection
files of their folders where there are any.
"""

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.collection import Contents, survey
from data_pipeline.config import CacheConfig
from data_pipeline.holdings import Holdings, holdings_for, require_pairs, require_some
from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.order import locate
from data_pipeline.remote import RemoteFile, RemoteShard, Shard
from data_pipeline.shards import find_shards, folders_of
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.types import Codec, RawSample

MAX_OPEN_SHARDS = 256
"""Open files per process; most systems allow 1024."""


@dataclass(frozen=True)
class Source:
    """The shards of one source and where the numbers of their samples end."""

    name: str
    shards: tuple[Shard, ...]
    names: tuple[str, ...]
    """A name for each shard: its stem, with as many parent folders as make it unique in the run."""
    ends: NDArray[np.int64]
    """[shards] Number of samples in this and all earlier shards."""
    num_bytes: NDArray[np.int64]
    """[shards] Length of each tar."""
    together: frozenset[frozenset[str]]
    """For each kind of sample the codecs that find members in it."""

    @property
    def num_samples(self) -> int:
        return int(self.ends[-1])

    def first_number(self, shard: int) -> int:
        """The number of a shard's first sample in the source."""
        return int(self.ends[shard - 1]) if shard else 0


def open_sources(
    patterns: Mapping[str, Sequence[str]],
    codecs: Mapping[str, Codec] | None = None,
    wants_all: bool = False,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
) -> tuple[Source, ...]:
    """Sources by name; shards without an index are indexed. Each shard must hold a sample with all that the codecs
    require; with `wants_all` there must be something for every codec in some shard."""
    codecs = codecs or {}
    found = {name: find_shards(listed, cache) for name, listed in patterns.items()}
    names = iter(_unique_names([shard for one in found.values() for shard in one.shards]))
    contents = {name: survey(one.shards, one.collections) for name, one in found.items()}
    holdings = {name: _holdings(one.shards, contents[name], codecs) for name, one in found.items()}
    every = list(chain.from_iterable(holdings.values()))
    require_some(every, {name: codec for name, codec in codecs.items() if codec.required or wants_all})
    for shard in every:
        require_pairs(shard, codecs)
    return tuple(
        Source(
            name=name,
            shards=one.shards,
            names=tuple(next(names) for _ in one.shards),
            ends=np.cumsum([shard.num_samples for shard in contents[name]], dtype=np.int64),
            num_bytes=np.array([shard.num_bytes for shard in contents[name]], np.int64),
            together=frozenset[frozenset[str]]().union(*(shard.together for shard in holdings[name])),
        )
        for name, one in found.items()
    )


def _holdings(shards: Iterable[Shard], contents: Iterable[Contents], codecs: Mapping[str, Codec]) -> list[Holdings]:
    return [
        holdings_for(shard, told.num_samples, told.kinds, codecs) for shard, told in zip(shards, contents, strict=True)
    ]


def _unique_names(shards: Sequence[Shard]) -> list[str]:
    """Stems where they differ; as many parent folders before them as it takes where they do not."""
    parts = [(*folders_of(shard), shard.stem) for shard in shards]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        shared = {name for name, count in Counter(names).items() if count > 1}
        deeper = [
            min(depth + (name in shared), len(part)) for name, depth, part in zip(names, depths, parts, strict=True)
        ]
        if deeper == depths:
            return names
        depths = deeper


class SampleFile(Protocol):
    """An open shard."""

    def read(self, ordinal: int, verify_checksum: bool) -> bytes:
        """The bytes of a sample's range. SampleError where they differ from the checksum, which is looked at when
        asked or needed."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A shard of this machine, kept open."""

    def __init__(self, shard: Path, index: ShardIndex) -> None:
        self.shard, self.index = shard, index
        try:
            self._file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{shard} cannot be opened: {error.strerror}") from error

    def read(self, ordinal: int, verify_checksum: bool) -> bytes:
        offset, length = self.index.sample_range(ordinal)
        try:
            content = os.pread(self._file, length, offset)
        except OSError as error:
            raise DataError(f"{self.shard}: reading {length} bytes at {offset} failed: {error.strerror}") from error
        if len(content) < length:
            raise DataError(
                f"{self.shard}: sample {self.index.key(ordinal)!r} should hold {length} bytes at byte {offset}, but "
                f"the file ends after {len(content)} of them: it was cut off while the run read it; fetch or make the "
                f"shard again"
            )
        if verify_checksum and zlib.crc32(content) != self.index.crc32(ordinal):
            raise SampleError("its bytes differ from the checksum in the shard's index")
        return content

    def close(self) -> None:
        os.close(self._file)


def _open(shard: Shard, index: ShardIndex, number: int) -> SampleFile:
    """`number`: that of the shard's first sample in its source."""
    return RemoteFile(shard, index, number) if isinstance(shard, RemoteShard) else LocalFile(shard, index)


def read_members(index: ShardIndex, ordinal: int) -> dict[str, bytes]:
    """The members of one sample of a shard that is not kept open."""
    file = _open(index.shard, index, 0)
    try:
        return index.slice_members(ordinal, file.read(ordinal, verify_checksum=False))
    finally:
        file.close()


@dataclass(frozen=True)
class Place:
    """Where a sample stands; its identity is (source, shard, ordinal)."""

    source: str
    shard_name: str
    ordinal: int
    index: ShardIndex
    file: SampleFile

    @property
    def shard(self) -> str:
        return str(self.index.shard)

    @property
    def key(self) -> str:
        return self.index.key(self.ordinal)

    @property
    def full_key(self) -> str:
        """Unique in the run."""
        return f"{self.shard_name}/{self.key}"

    def read(self, verify_checksum: bool = False) -> RawSample:
        """The sample with its members, by one read."""
        content = self.file.read(self.ordinal, verify_checksum)
        members = self.index.slice_members(self.ordinal, content)
        return RawSample(self.source, self.shard, self.ordinal, self.key, members)


class SampleReader:
    """Finds samples; shards are opened when first needed and the least recently used are closed.

    Pickles as its sources alone, so that each worker opens its own files.
    """

    def __init__(self, sources: Sequence[Source], max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self.sources = tuple(sources)
        self._max_open = max_open_shards
        self._open: OrderedDict[tuple[int, int], tuple[ShardIndex, SampleFile]] = OrderedDict()

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[tuple[Source, ...], int]]:
        return SampleReader, (self.sources, self._max_open)

    def __del__(self) -> None:
        while self._open:
            self._close_oldest()

    def find(self, source: int, sample: int) -> Place:
        """The place of sample number `sample` of source number `source`."""
        owner = self.sources[source]
        shards, ordinals = locate(np.array([sample]), owner.ends)
        shard = int(shards[0])
        index, file = self._shard(source, shard)
        return Place(owner.name, owner.names[shard], int(ordinals[0]), index, file)

    def file_at(self, source: int, shard: int) -> SampleFile:
        """The open file of a shard."""
        return self._shard(source, shard)[1]

    def _shard(self, source: int, shard: int) -> tuple[ShardIndex, SampleFile]:
        if (source, shard) not in self._open:
            self._open[source, shard] = self._open_shard(self.sources[source], shard)
            if len(self._open) > self._max_open:
                self._close_oldest()
        self._open.move_to_end((source, shard))
        return self._open[source, shard]

    def _open_shard(self, source: Source, number: int) -> tuple[ShardIndex, SampleFile]:
        shard, first = source.shards[number], source.first_number(number)
        index = load_or_build_index(shard)
        counted = int(source.ends[number]) - first
        if index.num_samples != counted:
            raise DataError(
                f"{shard} held {counted} samples when the run began and holds {index.num_samples} now; if the new "
                f"content is right, run `mmpretrain data index {shard.parent}` and start a new run"
            )
        return index, _open(shard, index, first)

    def _close_oldest(self) -> None:
        _, (_, file) = self._open.popitem(last=False)
        file.close()
