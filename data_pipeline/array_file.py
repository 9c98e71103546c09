"""One-dimensional arrays and a small JSON header in one file, mapped and not read.

Enter: named arrays and what the header says. Leave: the same, whose arrays share memory with every other process that
maps the file. Refused: a file that cannot be read, was cut or whose header was damaged; one of another version
counts as absent.

Layout: 8 bytes magic with the version, uint32 length and uint32 CRC-32 of the header, the header, then each array at a
multiple of 64 bytes, little-endian. The header holds a CRC-32 of the arrays, for who fetched the file from elsewhere.
"""

import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.types import Array

_PREFIX = struct.Struct("<8sII")
_ALIGN = 64
_NUMBERS = re.compile(r"[<|][iu][1248]")

Header = dict[str, Any]
"""JSON of whoever wrote the file."""


class DamagedFile(Exception):
    """The file is not what was written."""


def encode_arrays(magic: bytes, header: Mapping[str, object], arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a file."""
    layout: list[tuple[str, str, int, int]] = []
    body = bytearray()
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        layout.append((name, little.dtype.str, len(body), len(little)))
        body += little.tobytes()
        body += bytes(-len(body) % _ALIGN)
    described = {"arrays": layout, "body_bytes": len(body), "body_crc32": zlib.crc32(body)}
    text = json.dumps({**header, **described}).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % _ALIGN)
    return _PREFIX.pack(magic, len(text), zlib.crc32(text)) + text + body


def write_whole(path: Path, content: bytes) -> None:
    """Write and rename, so that a reader sees a whole file or none."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def map_arrays(path: Path, magic: bytes) -> tuple[Header, dict[str, Array]] | None:
    """Header and arrays; None where there is no file, or one of another version. Raises DamagedFile."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; let this user read it, or remove it") from error
    except ValueError as error:  # mmap's word for an empty file
        raise DamagedFile from error
    return read_arrays(mapped, magic)


def read_arrays(content: bytes | mmap.mmap, magic: bytes) -> tuple[Header, dict[str, Array]] | None:
    """Header and arrays of a file's bytes; None for those of another version. Raises DamagedFile."""
    if len(content) < _PREFIX.size:
        raise DamagedFile
    found, length, checksum = _PREFIX.unpack_from(content)
    if found != magic and found[:6] == magic[:6]:
        return None
    body = _PREFIX.size + length
    text = content[_PREFIX.size : body]
    if found != magic or zlib.crc32(text) != checksum:
        raise DamagedFile
    try:
        header = parse_json(text)
        layout, body_bytes = header.pop("arrays"), header.pop("body_bytes")
        arrays = {name: _array(content, body, kind, offset, count) for name, kind, offset, count in layout}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFile from error
    if len(content) != body + body_bytes:
        raise DamagedFile
    return header, arrays


def _array(content: bytes | mmap.mmap, body: int, kind: str, offset: int, count: int) -> Array:
    """One array; ValueError where it is of no plain numbers, or does not lie in the body."""
    if not _NUMBERS.fullmatch(kind) or offset < 0 or count < 0:
        raise ValueError(f"{count} times {kind} at {offset}")
    return np.frombuffer(content, np.dtype(kind), count, body + offset)


def fault_in(content: bytes, magic: bytes) -> str | None:
    """What is wrong with a whole file that came from elsewhere; its arrays are read for that."""
    try:
        loaded = read_arrays(content, magic)
    except DamagedFile:
        return f"{len(content)} bytes came that are no whole index"
    if loaded is None or "body_crc32" not in loaded[0]:
        return None
    header_end = _PREFIX.size + _PREFIX.unpack_from(content)[1]
    damaged = zlib.crc32(memoryview(content)[header_end:]) != loaded[0]["body_crc32"]
    return "its bytes differ from the checksum in its header" if damaged else None
