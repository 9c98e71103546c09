"""What all shards of a folder hold, in one file, so that a run opens a hundred thousand of them by one read.

Enter: the indexes of the folder's shards. Leave: `collection.index` beside them; from it, how many samples and bytes
each shard has and what kinds of samples. Refused: a damaged file, and names that lead out of the folder.

It is believed when a run begins, and each shard is compared with it when its own index is first read. The indexes of
few local shards are read all the same, since they tell at once what changed.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.array_file import DamagedFile, Header, encode_arrays, fault_in, map_arrays, read_arrays, write_whole
from data_pipeline.config import CacheConfig
from data_pipeline.holdings import Kind, kinds_of
from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.remote import RemoteShard, Shard, fetch_indexes, patience_of
from data_pipeline.stores import AbsentObject, read_whole
from mmpretrain.core.errors import DataError
from mmpretrain.core.folders import is_plain_name
from mmpretrain.core.types import Array

COLLECTION = "collection.index"

FEW_SHARDS = 1000
"""Local shards whose indexes are read when a run begins, which takes a second."""

MAX_SAMPLES = 1 << 53
"""Of all shards of a folder: numbers of samples stay below it, see order.py."""

_MAGIC = b"MMPCOL01"


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of a shard before it is opened."""

    num_samples: int
    num_bytes: int
    kinds: frozenset[Kind]
    version: str
    """Changes with the content that its index describes."""


Collection = Mapping[str, Contents]
"""Name of a shard -> its contents, by name."""


def contents_of(index: ShardIndex) -> Contents:
    version = zlib.crc32(index.checksum.tobytes(), zlib.crc32(index.offset.tobytes()))
    return Contents(index.num_samples, index.shard_bytes, kinds_of(index), f"{version:08x}")


def survey(shards: Iterable[Shard], known: Mapping[str, Collection]) -> list[Contents]:
    """The contents of each shard: from `known` (folder -> collection), the file of its folder, or its own index, which
    is made on first use."""
    listed = list(shards)
    few = sum(isinstance(shard, Path) for shard in listed) <= FEW_SHARDS
    collections = dict(known)
    told: list[Contents | None] = []
    for shard in listed:
        folder = str(shard.parent)
        if folder not in collections:
            collections[folder] = {} if few and isinstance(shard, Path) else _collection_beside(shard) or {}
        told.append(collections[folder].get(shard.name))
    lacking = [shard for shard, contents in zip(listed, told, strict=True) if contents is None]
    fetch_indexes([shard for shard in lacking if isinstance(shard, RemoteShard)])
    return [contents or contents_of(load_or_build_index(shard)) for shard, contents in zip(listed, told, strict=True)]


def save_collection(folder: Path, new: Collection) -> None:
    """Write the file of a folder whose every shard is in `new` or was in the file before; else leave none."""
    names = sorted(path.name for path in folder.glob("*.tar"))
    merged = {**_believed(folder), **new}
    if all(name in merged for name in names):
        write_whole(folder / COLLECTION, _encode({name: merged[name] for name in names}))
    else:
        (folder / COLLECTION).unlink(missing_ok=True)


def _believed(folder: Path) -> Collection:
    """What the file said before; nothing where it is damaged, since it is about to be made anew."""
    try:
        return load_collection(folder) or {}
    except DataError:
        return {}


def load_collection(folder: Path) -> Collection | None:
    """That of a local folder; None where there is none of this version."""
    try:
        loaded = map_arrays(folder / COLLECTION, _MAGIC)
        return None if loaded is None else _decode(*loaded)
    except DamagedFile as error:
        raise DataError(f"{folder / COLLECTION} is damaged; run `mmpretrain data index {folder}`") from error


def fetch_collection(folder: str, cache: CacheConfig) -> Collection | None:
    """That of a folder in an object store; None where there is none of this version."""
    try:
        content = read_whole(f"{folder}/{COLLECTION}", patience_of(cache), lambda content: fault_in(content, _MAGIC))
    except AbsentObject:
        return None
    try:
        loaded = read_arrays(content, _MAGIC)
        return None if loaded is None else _decode(*loaded)
    except DamagedFile as error:
        raise DataError(f"{folder}/{COLLECTION} is damaged; make it anew with `mmpretrain data index`") from error


def _collection_beside(shard: Shard) -> Collection | None:
    if isinstance(shard, RemoteShard):
        return fetch_collection(shard.parent, shard.cache)
    return load_collection(shard.parent)


def _encode(collection: Collection) -> bytes:
    sets = list(dict.fromkeys(contents.kinds for contents in collection.values()))
    numbers = {kinds: number for number, kinds in enumerate(sets)}
    names = [name.encode() for name in collection]
    rows = list(collection.values())
    header = {
        "kinds": [
            [[*sorted(kind.extensions), kind.captioned] for kind in sorted(kinds, key=_by_name)] for kinds in sets
        ]
    }
    arrays: dict[str, Array] = {
        "name_end": np.cumsum([len(name) for name in names], dtype=np.int64),
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "samples": np.array([row.num_samples for row in rows], np.int64),
        "bytes": np.array([row.num_bytes for row in rows], np.int64),
        "kinds": np.array([numbers[row.kinds] for row in rows], np.int32),
        "version": np.array([int(row.version, 16) for row in rows], np.uint32),
    }
    return encode_arrays(_MAGIC, header, arrays)


def _by_name(kind: Kind) -> tuple[list[str], bool]:
    return sorted(kind.extensions), kind.captioned


def _decode(header: Header, arrays: Mapping[str, Array]) -> Collection:
    try:
        sets = [frozenset(_kind(*told) for told in kinds) for kinds in header["kinds"]]
        joined, ends = arrays["name_bytes"].tobytes(), arrays["name_end"].tolist()
        names = [joined[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]
        columns = zip(*(arrays[name].tolist() for name in ("samples", "bytes", "kinds", "version")), strict=True)
        rows = list(zip(names, columns, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile from error
    for name in names:
        if not is_plain_name(name):
            raise DataError(f"{COLLECTION} names {name!r}, which is no file of its folder; make it again")
    if any(min(numbers) < 0 or numbers[2] >= len(sets) for _, numbers in rows):
        raise DamagedFile
    if sum(numbers[0] for _, numbers in rows) >= MAX_SAMPLES:
        raise DamagedFile
    return {
        name: Contents(samples, num_bytes, sets[kinds], f"{version:08x}")
        for name, (samples, num_bytes, kinds, version) in rows
    }


def _kind(*told: object) -> Kind:
    """Extensions, then whether there are captions; ValueError where a file says anything else."""
    *names, captioned = told
    if not isinstance(captioned, bool):
        raise ValueError(f"captioned is {captioned!r}")
    extensions = frozenset(name for name in names if isinstance(name, str))
    if len(extensions) != len(names):
        raise ValueError(f"extensions are {names!r}")
    return Kind(extensions, captioned)
