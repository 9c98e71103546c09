"""The bytes of an index file: what is known of a shard, and the arrays of its samples.

Enter: named one-dimensional arrays and the facts of a shard. Leave: the same from the file, mapped. Refused: a file
that was cut or whose header was damaged; one of another version counts as absent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.array_file import DamagedFile, encode_arrays, map_arrays
from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Array

INDEX_MAGIC = b"MMPIDX01"


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


def read_index_file(path: Path) -> tuple[IndexHeader, dict[str, Array]] | None:
    """Header and arrays; None where there is no file, or one of another version."""
    try:
        loaded = map_arrays(path, INDEX_MAGIC)
    except DamagedFile as error:
        raise DataError(f"index {path} is damaged; run `mmpretrain data index {path.parent} --rebuild`") from error
    if loaded is None:
        return None
    header, arrays = loaded
    header.pop("body_crc32", None)
    header["extensions"] = tuple(header["extensions"])
    return IndexHeader(**header), arrays
