"""The members of one tar shard by our own header walk, grouped into samples by the WebDataset rule.

Enter: the bytes of a plain tar (ustar, GNU long names, pax). Leave: `Member`s with their byte ranges, in file order,
and `SampleGroup`s of neighbouring members. Refused, naming shard and byte: damaged headers, cut files, members that
climb out, links, devices, sparse files, pickles, names with control characters, samples whose members stand apart.
`tarfile` ends quietly where a header is damaged.
"""

import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_pipeline.limits import CONTROL_CHARACTERS, MAX_HEADER_BYTES, MAX_SAMPLE_BYTES, PICKLE_EXTENSIONS
from data_pipeline.remote import RemoteShard, Shard, downloaded
from mmpretrain.core.errors import DataError

BLOCK = 512
MAX_TRAILING_ZEROS = 1 << 20
"""Tar pads to its record size, at most 1 MiB in practice; more zeros are a file whose copy never ended."""

# webdataset 1.0.2, tariterators.base_plus_ext and meta_regex: the rule other readers split names by
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^/.]+)[.]([^/]*)$", re.DOTALL)
_META_MEMBER = re.compile(r"__[^/]*__($|/)")
_SPARSE = b"GNU.sparse."
_REGULAR = frozenset({b"0", b"\0", b"7"})
_FOLDER = b"5"
_ABOUT_OTHERS = frozenset({b"L", b"K", b"x", b"g"})
_WITHOUT_CONTENT = frozenset({b"1", b"2", b"3", b"4", _FOLDER, b"6"})
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_ZERO_BLOCK = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a shard; offsets are bytes from the start of the shard."""

    name: str
    start: int
    """Where its headers begin, long-name headers included."""
    offset: int
    """Where its bytes begin."""
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + _padded(self.size)


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The neighbouring members of one key."""

    key: str
    members: tuple[tuple[str, Member], ...]
    """(extension in lower case, member) in file order."""

    @property
    def offset(self) -> int:
        return self.members[0][1].start

    @property
    def length(self) -> int:
        """Bytes from the first header to the end of the last member's padding: one read gets them all."""
        return self.members[-1][1].end - self.offset


@contextmanager
def open_shard(shard: Shard) -> Iterator[memoryview]:
    """The bytes of a shard, mapped and not read; one in an object store is fetched whole. A missing, empty or
    unreadable file is a DataError."""
    with (
        _opened(shard) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        yield view


@contextmanager
def _opened(shard: Shard) -> Iterator[IO[bytes]]:
    if isinstance(shard, RemoteShard):
        with downloaded(shard) as file:
            _refuse_empty(shard, os.fstat(file.fileno()).st_size)
            yield file
        return
    found = stat_of(shard)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"shard {shard} is not a file; name a .tar, or a folder of them in `shards:`")
    _refuse_empty(shard, found.st_size)
    try:
        file = shard.open("rb")
    except OSError as error:
        raise _unreadable(shard, error) from error
    with file:
        yield file


def stat_of(shard: Path) -> os.stat_result:
    """What the file system says of a local shard. One that is missing or out of reach is a DataError."""
    try:
        return shard.stat()
    except FileNotFoundError as error:
        raise DataError(f"shard {shard} does not exist; check the path, or fetch it again") from error
    except OSError as error:
        raise _unreadable(shard, error) from error


def _unreadable(shard: Path, error: OSError) -> DataError:
    return DataError(f"shard {shard} cannot be read: {error.strerror}; mend it, or let this user read it")


def _refuse_empty(shard: Shard, size: int) -> None:
    if size == 0:
        raise DataError(f"shard {shard} is empty (0 bytes); its copy or its writer was cut off: make it again")


def walk_members(data: memoryview, shard: Shard) -> Iterator[Member]:
    """Every regular file of the tar in order; the first fault raises DataError with its byte."""
    start = position = 0
    extended = dict[str, str]()  # what pax or GNU headers say of the member behind them
    while (header := _next_header(data, position, shard)) is not None:
        kind = header[156:157]
        name = extended.get("path") or _header_name(header, shard, position)
        size = _member_size(header, extended, shard, position)
        payload = position + BLOCK
        if payload + size > len(data):
            left = len(data) - payload
            what = f"member {name!r} should hold {size} bytes and the file ends after {left}: it was cut off"
            raise _fault(shard, position, what)
        position = payload + _padded(size)
        if kind in _ABOUT_OTHERS:
            if size > MAX_HEADER_BYTES:
                what = f"a header about the member behind it holds {size} bytes, more than {MAX_HEADER_BYTES}"
                raise _fault(shard, start, what)
            extended |= _about_next(kind, bytes(data[payload : payload + size]), shard, start)
            continue
        if kind in _REGULAR and not name.endswith("/"):
            _refuse_unsafe(name, shard, start)
            yield Member(name, start, payload, size)
        elif kind not in _REGULAR and kind != _FOLDER:
            what = _KINDS.get(kind, f"of unknown type {kind!r}")
            raise _fault(shard, start, f"member {name!r} is {what}; only regular files are read")
        start, extended = position, {}


def _about_next(kind: bytes, content: bytes, shard: Shard, start: int) -> dict[str, str]:
    """What a header of these kinds says of the member behind it; a global one may say nothing that is used here."""
    if kind == b"L":
        return {"path": _text(content.rstrip(b"\0"), shard, start)}
    if kind == b"K":
        return {}
    told = _pax_fields(content, shard, start)
    if kind == b"g" and told:
        raise _fault(shard, start, f"a global pax header gives all members one {' and '.join(told)}")
    return told


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member; None for what WebDataset readers pass over (no extension, `__meta__`)."""
    matched = _KEY_AND_EXTENSION.match(name)
    if matched is None or _META_MEMBER.match(name):
        return None
    return matched.group(1), matched.group(2).lower()


def group_samples(
    members: Iterable[Member], shard: Shard, report: Callable[[DataError], None] | None = None
) -> Iterator[SampleGroup]:
    """Group neighbours of one key. A fault is raised, or handed to `report` and its member left out."""
    report = report or _raise
    seen: set[str] = set()
    key, found = "", dict[str, Member]()
    for member in members:
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key:
            if found:
                yield SampleGroup(key, tuple(found.items()))
            key, found = split[0], {}
            if key in seen:
                report(_fault(shard, member.start, _apart(key, member.name)))
            seen.add(key)
        if split[1] in found:
            first = found[split[1]]
            report(_fault(shard, member.start, _twice(key, split[1], first)))
            continue
        if member.end - next(iter(found.values()), member).start > MAX_SAMPLE_BYTES:
            report(_fault(shard, member.start, _too_large(key)))
            continue
        found[split[1]] = member
    if found:
        yield SampleGroup(key, tuple(found.items()))


def _apart(key: str, name: str) -> str:
    return (
        f"member {name!r} belongs to key {key!r}, whose sample ended earlier in this shard: a duplicate key, or "
        f"members that are not adjacent; write the members of one sample side by side, under a key of its own"
    )


def _twice(key: str, extension: str, first: Member) -> str:
    return (
        f"key {key!r} holds .{extension} twice, first at byte {first.start}: a duplicate member; "
        f"give each sample a key of its own"
    )


def _too_large(key: str) -> str:
    return f"the members of key {key!r} hold more than {MAX_SAMPLE_BYTES} bytes, too many for one read; store less"


def _raise(error: DataError) -> None:
    raise error


def _fault(shard: Shard, position: int, what: str) -> DataError:
    return DataError(f"{shard}: at byte {position}: {what}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(data: memoryview, position: int, shard: Shard) -> bytes | None:
    """The 512 bytes at `position`, their checksum verified; None at the end of the archive."""
    header = bytes(data[position : position + BLOCK])
    if len(header) < BLOCK:
        raise _fault(shard, position, "the file ends without an end-of-archive block: it was cut off")
    if header == _ZERO_BLOCK:
        _check_tail(data, position, shard)
        return None
    _check_sum(header, shard, position)
    return header


def _member_size(header: bytes, extended: dict[str, str], shard: Shard, position: int) -> int:
    if header[156:157] in _WITHOUT_CONTENT:
        return 0
    if "size" not in extended or header[156:157] in _ABOUT_OTHERS:
        return _number(header[124:136], shard, position)
    if not (extended["size"].isascii() and extended["size"].isdigit() and len(extended["size"]) < 20):
        raise _fault(shard, position, f"a damaged pax header: size {extended['size']!r} is not a number")
    return int(extended["size"])


def _check_sum(header: bytes, shard: Shard, position: int) -> None:
    stored = _number(header[148:156], shard, position)
    seen = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored != seen:
        raise _fault(
            shard,
            position,
            f"this is no tar header, or a damaged one: its checksum says {stored}, its bytes sum to {seen}; "
            f"fetch or make the shard again",
        )


def _check_tail(data: memoryview, position: int, shard: Shard) -> None:
    zeros = 0
    for at in range(position, len(data), 1 << 20):
        part = bytes(data[at : at + (1 << 20)])
        zeros += len(part)
        if part.count(0) != len(part):
            raise _fault(
                shard,
                position,
                "an end-of-archive block, and data behind it: a header was wiped, or tars were concatenated",
            )
    if zeros > MAX_TRAILING_ZEROS:
        raise _fault(shard, position, f"{zeros} bytes of zeros up to the end: the copy of this file never finished")


def _number(field: bytes, shard: Shard, position: int) -> int:
    if field[0] & 0x80:  # GNU base 256, for sizes past 8 GiB
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise _fault(shard, position, f"this is no tar header, or a damaged one: {digits!r} is not octal")
    return int(digits or b"0", 8)


def _header_name(header: bytes, shard: Shard, position: int) -> str:
    name = _text(header[:100].split(b"\0", 1)[0], shard, position)
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix, shard, position)}/{name}" if prefix else name


def _text(raw: bytes, shard: Shard, position: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _fault(shard, position, f"the member name {raw!r} is not UTF-8; rename it") from error


def _pax_fields(raw: bytes, shard: Shard, position: int) -> dict[str, str]:
    """Records are "<length> <name>=<value>\\n", the length counting itself."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(raw) and raw[at : at + 1] != b"\0":
        space = raw.find(b" ", at, at + 20)
        length = int(raw[at:space]) if space > at and raw[at:space].isdigit() else 0
        record = raw[space + 1 : at + length]
        if at + length > len(raw) or not record.endswith(b"\n") or b"=" not in record:
            raise _fault(shard, position, "a damaged pax header; fetch or make the shard again")
        name, value = record[:-1].split(b"=", 1)
        if name.startswith(_SPARSE):
            raise _fault(shard, position, "the member is a sparse file; only regular files are read")
        if name in (b"path", b"size"):
            fields[name.decode()] = _text(value, shard, position)
        at += length
    return fields


def _refuse_unsafe(name: str, shard: Shard, position: int) -> None:
    if name.startswith("/"):
        raise _fault(shard, position, f"member {name!r} has an absolute name; such a shard is refused")
    if CONTROL_CHARACTERS.search(name):
        raise _fault(shard, position, f"member {name!r} has control characters in its name; such a shard is refused")
    if ".." in name.split("/"):
        raise _fault(shard, position, f"member {name!r} climbs out of its folder; such a shard is refused")
    extension = name.rpartition("/")[2].lower().split(".")[1:]
    if PICKLE_EXTENSIONS.intersection(extension):
        raise _fault(
            shard,
            position,
            f"{name!r} is a pickle member, and unpickling runs code of whoever wrote it; "
            f"store it as .json, .txt or .npy",
        )
