"""One sample of a shard by one read, found through the shard's index.

Enter: the patterns of a source, then (source, sample number). Leave: its place and name, and when asked its members.
Refused: shards that are missing, cut off or without pairs, as a DataError; bytes that differ from their checksum, as a
SampleError.
"""

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.holdings import Holdings, holdings_of, require_pairs, require_some
from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.order import locate
from data_pipeline.shards import resolve_shards
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.types import Codec, RawSample

MAX_OPEN_SHARDS = 256
"""Open files per process; most systems allow 1024."""


@dataclass(frozen=True)
class Source:
    """The shards of one source and where the numbers of their samples end."""

    name: str
    shards: tuple[Path, ...]
    names: tuple[str, ...]
    """A name for each shard: its stem, with as many parent folders as make it unique in the run."""
    ends: NDArray[np.int64]
    """[shards] Number of samples in this and all earlier shards."""
    together: frozenset[frozenset[str]]
    """For each kind of sample the codecs that find members in it."""

    @property
    def num_samples(self) -> int:
        return int(self.ends[-1])


def open_sources(
    patterns: Mapping[str, Sequence[str]], codecs: Mapping[str, Codec] | None = None, wants_all: bool = False
) -> tuple[Source, ...]:
    """Sources by name; shards without an index are indexed. Each shard must hold a sample with all that the codecs
    require; with `wants_all` there must be something for every codec in some shard."""
    codecs = codecs or {}
    shards = {name: tuple(resolve_shards(listed)) for name, listed in patterns.items()}
    names = iter(_unique_names([shard for listed in shards.values() for shard in listed]))
    holdings = {
        name: [holdings_of(load_or_build_index(shard), codecs) for shard in listed] for name, listed in shards.items()
    }
    every = list(chain.from_iterable(holdings.values()))
    require_some(every, {name: codec for name, codec in codecs.items() if codec.required or wants_all})
    for shard in every:
        require_pairs(shard, codecs)
    return tuple(
        Source(name, listed, tuple(next(names) for _ in listed), _ends(holdings[name]), _together(holdings[name]))
        for name, listed in shards.items()
    )


def _ends(holdings: Iterable[Holdings]) -> NDArray[np.int64]:
    return np.cumsum([shard.num_samples for shard in holdings], dtype=np.int64)


def _together(holdings: Iterable[Holdings]) -> frozenset[frozenset[str]]:
    return frozenset[frozenset[str]]().union(*(shard.together for shard in holdings))


def _unique_names(shards: Sequence[Path]) -> list[str]:
    """Stems where they differ; as many parent folders before them as it takes where they do not."""
    parts = [(*shard.resolve().parts[1:-1], shard.stem) for shard in shards]
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


@dataclass(frozen=True)
class Place:
    """Where a sample stands; its identity is (source, shard, ordinal)."""

    source: str
    shard_name: str
    ordinal: int
    index: ShardIndex
    file: int
    """Descriptor of the open shard."""

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
        offset, length = self.index.sample_range(self.ordinal)
        try:
            content = os.pread(self.file, length, offset)
        except OSError as error:
            raise DataError(f"{self.shard}: reading {length} bytes at {offset} failed: {error.strerror}") from error
        if len(content) < length:
            raise DataError(
                f"{self.shard}: sample {self.key!r} should hold {length} bytes at byte {offset}, but the file ends "
                f"after {len(content)} of them: it was cut off while the run read it; fetch or make the shard again"
            )
        if verify_checksum and zlib.crc32(content) != self.index.crc32(self.ordinal):
            raise SampleError("its bytes differ from the checksum in the shard's index")
        members = self.index.slice_members(self.ordinal, content)
        return RawSample(self.source, self.shard, self.ordinal, self.key, members)


class SampleReader:
    """Finds samples; shards are opened when first needed and the least recently used are closed.

    Pickles as its sources alone, so that each worker opens its own files.
    """

    def __init__(self, sources: Sequence[Source], max_open_shards: int = MAX_OPEN_SHARDS) -> None:
        self.sources = tuple(sources)
        self._max_open = max_open_shards
        self._open: OrderedDict[tuple[int, int], tuple[ShardIndex, int]] = OrderedDict()

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

    def _shard(self, source: int, shard: int) -> tuple[ShardIndex, int]:
        if (source, shard) not in self._open:
            self._open[source, shard] = self._open_shard(self.sources[source], shard)
            if len(self._open) > self._max_open:
                self._close_oldest()
        self._open.move_to_end((source, shard))
        return self._open[source, shard]

    def _open_shard(self, source: Source, shard: int) -> tuple[ShardIndex, int]:
        path = source.shards[shard]
        index = load_or_build_index(path)
        counted = int(source.ends[shard]) - (int(source.ends[shard - 1]) if shard else 0)
        if index.num_samples != counted:
            raise DataError(f"{path} held {counted} samples when the run began and holds {index.num_samples} now")
        try:
            return index, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}") from error

    def _close_oldest(self) -> None:
        _, (_, file) = self._open.popitem(last=False)
        os.close(file)
