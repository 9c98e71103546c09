"""Where each sample of a shard begins, how long it is, its checksum and its cheap facts, in a file beside the shard.

Enter: a tar shard. Leave: a `ShardIndex`, written once as `<shard>.tar.index`; that of a shard in an object store is
fetched from beside it or made from one pass, and kept in the cache. Refused: a shard that changed since, a damaged
index, a tar without samples.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.array_file import write_whole
from data_pipeline.facts import SampleFacts, facts_of
from data_pipeline.index_file import IndexHeader, encode_index, index_path, read_index_file
from data_pipeline.remote import RemoteShard, Shard, cached_index, keep_index
from data_pipeline.tar import Member, SampleGroup, group_samples, open_shard, split_name, stat_of, walk_members
from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Array

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What is known of each sample without decoding it; 0 where the sample has no such thing."""

    width: NDArray[np.int32]
    """[samples] Pixels, from the image's header."""
    height: NDArray[np.int32]
    """[samples] Pixels, from the image's header."""
    captions: NDArray[np.int32]
    """[samples] Number of captions."""
    characters: NDArray[np.int32]
    """[samples] Characters of the longest caption."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard; their numbers are ordinals, in file order from 0."""

    shard: Shard
    shard_bytes: int
    shard_mtime_ns: int
    extensions: tuple[str, ...]
    """Every extension that occurs; the member table holds numbers into it."""
    ignored: int
    """Members that belong to no sample: hidden, without an extension, or named `__meta__`."""
    offset: NDArray[np.int64]
    """[samples] Byte where the first header of the sample begins."""
    length: NDArray[np.int64]
    """[samples] Bytes up to the end of its last member: one read gets them all."""
    checksum: NDArray[np.uint32]
    """[samples] CRC-32 of that range."""
    key_end: NDArray[np.int64]
    """[samples] Where the sample's key ends in `key_bytes`."""
    key_bytes: NDArray[np.uint8]
    member_end: NDArray[np.int64]
    """[samples] Where the sample's rows end in the member table."""
    member_extension: NDArray[np.int32]
    """[members] Number of its extension."""
    member_offset: NDArray[np.int64]
    """[members] Byte of its content, relative to the sample's offset."""
    member_size: NDArray[np.int64]
    """[members] Bytes of its content."""
    facts: Facts

    @property
    def num_samples(self) -> int:
        return len(self.offset)

    def key(self, ordinal: int) -> str:
        begin = int(self.key_end[ordinal - 1]) if ordinal else 0
        return self.key_bytes[begin : int(self.key_end[ordinal])].tobytes().decode()

    def keys(self) -> list[str]:
        return [self.key(ordinal) for ordinal in range(self.num_samples)]

    def sample_range(self, ordinal: int) -> tuple[int, int]:
        """(offset, length) in bytes of the sample's whole range in the shard."""
        return int(self.offset[ordinal]), int(self.length[ordinal])

    def crc32(self, ordinal: int) -> int:
        return int(self.checksum[ordinal])

    def members(self, ordinal: int) -> list[tuple[str, int, int]]:
        """(extension, offset from the sample's begin, size) of each member, in file order."""
        rows = slice(int(self.member_end[ordinal - 1]) if ordinal else 0, int(self.member_end[ordinal]))
        extensions = [self.extensions[number] for number in self.member_extension[rows].tolist()]
        offsets, sizes = self.member_offset[rows].tolist(), self.member_size[rows].tolist()
        return list(zip(extensions, offsets, sizes, strict=True))

    def slice_members(self, ordinal: int, content: bytes | memoryview) -> dict[str, bytes]:
        """Extension -> bytes, cut from the bytes of `sample_range(ordinal)`."""
        return {name: bytes(content[begin : begin + size]) for name, begin, size in self.members(ordinal)}

    def holds(self, extensions: frozenset[str]) -> NDArray[np.bool_]:
        """[samples] Whether the sample has at least one member of these extensions."""
        wanted = [number for number, name in enumerate(self.extensions) if name in extensions]
        hits = np.concatenate(([0], np.cumsum(np.isin(self.member_extension, wanted))))
        held: NDArray[np.bool_] = np.diff(hits[self.member_end], prepend=0) > 0
        return held


def load_or_build_index(shard: Shard) -> ShardIndex:
    """The shard's index: from its file, or built and saved on first use. Changed shards are refused."""
    index = load_index(shard)
    if index is None:
        index = build_index(shard)
        save_index(index)
    return index


def read_index(shard: Shard) -> ShardIndex | None:
    """The saved index, whether or not it still describes the shard; None where there is none of this version."""
    if isinstance(shard, RemoteShard):
        with cached_index(shard) as path:
            loaded = None if path is None else read_index_file(path, shard.index_url)
    else:
        loaded = read_index_file(index_path(shard))
    return None if loaded is None else _from_file(shard, *loaded)


def load_index(shard: Shard) -> ShardIndex | None:
    """The saved index if it still describes the shard, which is refused if it changed; None where there is none.

    That of a shard in an object store is believed: each range that is read is compared with it.
    """
    index = read_index(shard)
    if index is None or isinstance(shard, RemoteShard):
        return index
    stat = _size_and_time(shard)
    if stat == (index.shard_bytes, index.shard_mtime_ns):
        return index
    if stat[0] != index.shard_bytes or next(changed_samples(index), None) is not None:
        raise DataError(
            f"{shard} changed since it was indexed; if the new content is right, run "
            f"`mmpretrain data index {shard.parent} --rebuild`"
        )
    index = replace(index, shard_mtime_ns=stat[1])  # a copy of the same bytes at another time
    save_index(index)
    return index


def build_index(shard: Shard, report: Callable[[DataError], None] | None = None) -> ShardIndex:
    """Read the whole shard once. The first fault is raised; with `report` every fault is handed to it instead."""
    mtime_ns = 0 if isinstance(shard, RemoteShard) else _size_and_time(shard)[1]
    with open_shard(shard) as data:
        shard_bytes = len(data)
        walk = walk_members(data, shard)
        members = list(walk if report is None else _until_fault(walk, report))
        groups = list(group_samples(members, shard, report))
        ranges = [(group.offset, group.length) for group in groups]
        checksums = [zlib.crc32(data[offset : offset + length]) for offset, length in ranges]
        facts = [facts_of(_contents(data, group)) for group in groups]
    if not groups and report is None:
        raise DataError(f"{shard} holds no sample; members are named `key.extension`, as in 000001.jpg, 000001.txt")
    keys = [group.key.encode() for group in groups]
    table = [(name, member.offset - group.offset, member.size) for group in groups for name, member in group.members]
    extensions = tuple(dict.fromkeys(name for name, _, _ in table))
    numbers = {name: number for number, name in enumerate(extensions)}
    return ShardIndex(
        shard=shard,
        shard_bytes=shard_bytes,
        shard_mtime_ns=mtime_ns,
        extensions=extensions,
        ignored=sum(split_name(member.name) is None for member in members),
        offset=np.array([offset for offset, _ in ranges], np.int64),
        length=np.array([length for _, length in ranges], np.int64),
        checksum=np.array(checksums, np.uint32),
        key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        member_end=np.cumsum([len(group.members) for group in groups], dtype=np.int64),
        member_extension=np.array([numbers[name] for name, _, _ in table], np.int32),
        member_offset=np.array([offset for _, offset, _ in table], np.int64),
        member_size=np.array([size for _, _, size in table], np.int64),
        facts=Facts(*(np.array(column, np.int32) for column in _columns(facts))),
    )


def save_index(index: ShardIndex) -> None:
    """Write the index beside its shard, or into the cache of a shard in an object store; in a folder that cannot be
    written it stays in memory, with one warning."""
    header = IndexHeader(index.shard_bytes, index.shard_mtime_ns, index.extensions, index.ignored)
    arrays = {name: value for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    content = encode_index(header, arrays | vars(index.facts))
    if isinstance(index.shard, RemoteShard):
        keep_index(index.shard, content)
        return
    try:
        write_whole(index_path(index.shard), content)
    except OSError as error:
        _warn_unsaved(index.shard.parent, error.strerror)


def changed_samples(index: ShardIndex) -> Iterator[int]:
    """Ordinals whose bytes no longer have the checksum of the index; reads the whole shard."""
    with open_shard(index.shard) as data:
        for ordinal in range(index.num_samples):
            offset, length = index.sample_range(ordinal)
            if zlib.crc32(data[offset : offset + length]) != index.crc32(ordinal):
                yield ordinal


def _from_file(shard: Shard, header: IndexHeader, arrays: Mapping[str, Array]) -> ShardIndex:
    def int64(name: str) -> NDArray[np.int64]:
        return arrays[name].astype(np.int64, copy=False)

    return ShardIndex(
        shard,
        header.shard_bytes,
        header.shard_mtime_ns,
        header.extensions,
        header.ignored,
        offset=int64("offset"),
        length=int64("length"),
        checksum=arrays["checksum"].astype(np.uint32, copy=False),
        key_end=int64("key_end"),
        key_bytes=arrays["key_bytes"].astype(np.uint8, copy=False),
        member_end=int64("member_end"),
        member_extension=arrays["member_extension"].astype(np.int32, copy=False),
        member_offset=int64("member_offset"),
        member_size=int64("member_size"),
        facts=Facts(*(arrays[name].astype(np.int32, copy=False) for name in SampleFacts._fields)),
    )


def _size_and_time(shard: Path) -> tuple[int, int]:
    stat = stat_of(shard)
    return stat.st_size, stat.st_mtime_ns


def _until_fault(members: Iterator[Member], report: Callable[[DataError], None]) -> Iterator[Member]:
    try:
        yield from members
    except DataError as error:
        report(error)


def _contents(data: memoryview, group: SampleGroup) -> dict[str, bytes]:
    return {name: bytes(data[member.offset : member.offset + member.size]) for name, member in group.members}


def _columns(facts: Iterable[SampleFacts]) -> list[list[int]]:
    return [list(column) for column in zip(*facts, strict=True)] or [[] for _ in SampleFacts._fields]


@cache
def _warn_unsaved(folder: Path, reason: str | None) -> None:
    _LOG.warning(
        "indexes of the shards in %s cannot be saved (%s); they are rebuilt in memory by every run", folder, reason
    )
