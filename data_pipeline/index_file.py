"""The bytes of an index file: what is known of a shard, and the arrays of its samples.

Enter: named one-dimensional arrays and the facts of a shard. Leave: the same from the file, mapped. Refused: a file
that was cut or whose header was damaged, and one whose arrays do not fit each other or the shard, since whoever wrote
it would say which bytes are read; one of another version counts as absent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.array_file import DamagedFile, Header, encode_arrays, map_arrays
from data_pipeline.facts import SampleFacts
from data_pipeline.limits import CONTROL_CHARACTERS, MAX_SAMPLE_BYTES
from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Array

INDEX_MAGIC = b"MMPIDX01"

_OF_SAMPLES: dict[str, type[np.integer]] = {
    "offset": np.int64,
    "length": np.int64,
    "checksum": np.uint32,
    "key_end": np.int64,
    "member_end": np.int64,
    **dict.fromkeys(SampleFacts._fields, np.int32),
}
_OF_MEMBERS: dict[str, type[np.integer]] = {
    "member_extension": np.int32,
    "member_offset": np.int64,
    "member_size": np.int64,
}
_COLUMNS = _OF_SAMPLES | _OF_MEMBERS | {"key_bytes": np.uint8}
_CHECKED = ("offset", "length", "member_end", "key_end", "member_offset", "member_size", "member_extension")

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class IndexHeader:
    """What the index says of its shard besides the arrays."""

    shard_bytes: int
    shard_mtime_ns: int
    extensions: tuple[str, ...]
    ignored: int


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index")


def encode_index(header: IndexHeader, arrays: Mapping[str, Array]) -> bytes:
    return encode_arrays(INDEX_MAGIC, asdict(header), arrays)


def read_index_file(path: Path, published_at: str | None = None) -> tuple[IndexHeader, dict[str, Array]] | None:
    """Header and arrays; None where there is no file, or one of another version. `published_at`: where it came from."""
    try:
        loaded = map_arrays(path, INDEX_MAGIC)
        return None if loaded is None else _checked(*loaded)
    except DamagedFile as error:
        if published_at is not None:
            raise DataError(
                f"index {published_at} is damaged; make it with `mmpretrain data index`, and upload it"
            ) from error
        raise DataError(f"index {path} is damaged; run `mmpretrain data index {path.parent} --rebuild`") from error


def _checked(header: Header, arrays: Mapping[str, Array]) -> tuple[IndexHeader, dict[str, Array]]:
    try:
        names, numbers = header["extensions"], [header[name] for name in ("shard_bytes", "shard_mtime_ns", "ignored")]
        columns: dict[str, Array] = {name: arrays[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
    except KeyError as error:
        raise DamagedFile from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedFile
    if not all(type(number) is int for number in numbers) or not _fits(columns, len(names), numbers[0]):
        raise DamagedFile
    return IndexHeader(numbers[0], numbers[1], tuple(names), numbers[2]), columns


def _fits(columns: Mapping[str, Array], extensions: int, shard_bytes: int) -> bool:
    """Whether the arrays belong together and lead nowhere but into the shard."""
    lengths = {len(columns[name]) for name in _OF_SAMPLES}, {len(columns[name]) for name in _OF_MEMBERS}
    if any(len(found) > 1 for found in lengths):
        return False
    offset, length, member_end, key_end, begin, size, extension = (columns[name].astype(np.int64) for name in _CHECKED)
    if not _rises_to(member_end, len(size)) or not _lies_in(offset, length, shard_bytes):
        return False
    room = np.repeat(length, np.diff(member_end, prepend=0))
    return (
        bool((length <= MAX_SAMPLE_BYTES).all())
        and _lies_in(begin, size, room)
        and bool(((extension >= 0) & (extension < extensions)).all())
        and _are_keys(columns["key_bytes"].astype(np.uint8, copy=False), key_end)
    )


def _rises_to(ends: Int64s, total: int) -> bool:
    """Whether these ends cut `total` things into parts."""
    if not len(ends):
        return total == 0
    return int(ends[0]) >= 0 and int(ends[-1]) == total and bool((ends[1:] >= ends[:-1]).all())


def _lies_in(begin: Int64s, size: Int64s, room: int | Int64s) -> bool:
    """Whether ranges lie within so many bytes; written so that no sum can overflow."""
    return bool(((begin >= 0) & (size >= 0) & (begin <= room) & (size <= room - begin)).all())


def _are_keys(key_bytes: NDArray[np.uint8], ends: Int64s) -> bool:
    """Whether the bytes are keys of UTF-8, each whole, without control characters."""
    if not _rises_to(ends, len(key_bytes)):
        return False
    begins = ends[ends < len(key_bytes)]
    inside_character = (key_bytes[begins] & 0xC0) == 0x80
    try:
        text = key_bytes.tobytes().decode()
    except UnicodeDecodeError:
        return False
    return not inside_character.any() and CONTROL_CHARACTERS.search(text) is None
