"""The bytes of an index file: a small JSON header, then the arrays, mapped and not read.

Enter: named one-dimensional arrays and the facts of a shard. Leave: the same from the file, whose arrays share memory
with every other process that maps it. Refused: a file that was cut or whose header was damaged; one of another version
counts as absent.

Layout: 8 bytes magic with the version, uint32 length and uint32 CRC-32 of the header, the header, then each array at a
multiple of 64 bytes, little-endian.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Array

_MAGIC = b"MMPIDX01"
_PREFIX = struct.Struct("<8sII")
_ALIGN = 64


@dataclass(frozen=True)
class IndexHeader:
    """What the index says of its shard besides the arrays."""

    shard_bytes: int
    shard_mtime_ns: int
    extensions: tuple[str, ...]
    ignored: int


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index")


def write_index_file(path: Path, header: IndexHeader, arrays: Mapping[str, Array]) -> None:
    """Write and rename, so that a reader sees a whole file or none."""
    layout: list[tuple[str, str, int, int]] = []
    body = bytearray()
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        layout.append((name, little.dtype.str, len(body), len(little)))
        body += little.tobytes()
        body += bytes(-len(body) % _ALIGN)
    text = json.dumps(asdict(header) | {"arrays": layout, "body_bytes": len(body)}).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % _ALIGN)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)) + text + body)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_index_file(path: Path) -> tuple[IndexHeader, dict[str, Array]] | None:
    """Header and arrays; None where there is no file, or one of another version."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except ValueError as error:  # mmap's word for an empty file
        raise _damaged(path) from error
    if len(mapped) < _PREFIX.size:
        raise _damaged(path)
    magic, length, checksum = _PREFIX.unpack_from(mapped)
    if magic != _MAGIC and magic[:6] == _MAGIC[:6]:
        return None
    body = _PREFIX.size + length
    text = mapped[_PREFIX.size : body]
    if magic != _MAGIC or zlib.crc32(text) != checksum:
        raise _damaged(path)
    described = json.loads(text)
    layout, body_bytes = described.pop("arrays"), described.pop("body_bytes")
    if len(mapped) != body + body_bytes:
        raise _damaged(path)
    described["extensions"] = tuple(described["extensions"])
    arrays = {name: np.frombuffer(mapped, np.dtype(kind), count, body + offset) for name, kind, offset, count in layout}
    return IndexHeader(**described), arrays


def _damaged(path: Path) -> DataError:
    return DataError(f"index {path} is damaged; run `mmpretrain data index {path.parent} --rebuild`")
