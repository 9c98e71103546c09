"""Which shards a list of folders, globs, brace ranges and addresses names.

Enter: patterns from a config or a command line. Leave: existing local tars, sorted within each pattern, and tars in
object stores. Refused: `pipe:`, patterns that match nothing, folders that cannot be listed, a local range with holes, a
shard named twice.
"""

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.collection import Collection
from data_pipeline.config import CacheConfig
from data_pipeline.remote import RemoteShard, Shard
from data_pipeline.shard_lists import find_remote
from data_pipeline.stores import SCHEMES, scheme_of
from mmpretrain.core.errors import DataError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HOW_TO_MAKE = "make shards with `mmpretrain data pack FOLDER --captions FILE --out DIR`"


@dataclass(frozen=True)
class Found:
    """Shards in a fixed order."""

    shards: tuple[Shard, ...]
    collections: dict[str, Collection]
    """Folder -> what its collection file says, where finding the shards had to read it."""


def resolve_shards(patterns: Iterable[str], cache: CacheConfig = CacheConfig()) -> list[Shard]:  # noqa: B008 - frozen
    """The shards in a fixed order: as the patterns stand, and by name within a pattern."""
    return list(find_shards(patterns, cache).shards)


def find_shards(patterns: Iterable[str], cache: CacheConfig = CacheConfig()) -> Found:  # noqa: B008 - frozen
    """The same with what was learned on the way."""
    shards: list[Shard] = []
    collections: dict[str, Collection] = {}
    for pattern in patterns:
        if scheme_of(pattern) is None:
            shards += _resolve(pattern)
        else:
            for address in _expand(pattern):
                remote, known = find_remote(address, cache)
                shards += remote
                collections |= known
    if not shards:
        raise DataError(f"no shards are named; list folders, globs or tars under `shards:`, or {_HOW_TO_MAKE}")
    _refuse_repeats(shards)
    return Found(tuple(shards), collections)


def shard_at(name: str) -> Shard:
    """The shard that `str` of it names."""
    return Path(name) if scheme_of(name) is None else RemoteShard(name)


def _refuse_repeats(shards: Iterable[Shard]) -> None:
    seen: set[str] = set()
    for shard in shards:
        place = _whole_name(shard)
        if place in seen:
            raise DataError(
                f"shard {shard} is named twice; name it once, and use the source's `weight` to see it more often"
            )
        seen.add(place)


def folders_of(shard: Shard) -> tuple[str, ...]:
    """Where a shard stands as it is named, without links among its folders. It may be a link itself: the hub's cache
    keeps all files in one folder under their checksums."""
    return shard.parts[:-1] if isinstance(shard, RemoteShard) else _resolved(shard.parent.absolute()).parts[1:]


def _whole_name(shard: Shard) -> str:
    """The same for all names of one file: an absolute path without links, or the address."""
    if isinstance(shard, RemoteShard):
        return shard.url
    if os.path.islink(shard):  # noqa: PTH114 - Path raises where a folder may not be searched
        return os.path.realpath(shard)
    return f"{_resolved(shard.parent.absolute())}/{shard.name}"


@functools.cache
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def _resolve(pattern: str) -> list[Path]:
    _refuse_scheme(pattern)
    try:
        return _find_local(pattern)
    except OSError as error:
        raise DataError(
            f"shards {pattern!r}: {error.filename} cannot be read: {error.strerror}; correct the path, or let this "
            f"user read it"
        ) from error


def _find_local(pattern: str) -> list[Path]:
    if _RANGE.search(pattern):
        return _resolve_range(pattern)
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _resolve_folder(path)
    if path.exists():
        return [path]
    root = Path(path.anchor)
    matches = sorted(root.glob(str(path.relative_to(root))))
    if not matches:
        _open_folder(next(parent for parent in path.parents if parent.is_dir()))
        raise DataError(f"shards {pattern!r}: nothing there; check the path, or {_HOW_TO_MAKE}")
    return [shard for match in matches for shard in (_resolve_folder(match) if match.is_dir() else [match])]


def _refuse_scheme(pattern: str) -> None:
    scheme = _SCHEME.match(pattern)
    if scheme is None:
        return
    if scheme.group(1).lower() == "pipe":
        raise DataError(
            f"shards {pattern!r}: `pipe:` runs a shell command, and shell commands are never run; "
            f"copy the shards to a local or mounted folder and name that"
        )
    raise DataError(
        f"shards {pattern!r}: {scheme.group(1)}: is not read; known are local paths and "
        f"{', '.join(f'{name}://' for name in SCHEMES)}"
    )


def _resolve_range(pattern: str) -> list[Path]:
    names = _expand(pattern)
    if any(character in pattern for character in "*?["):
        return [shard for name in names for shard in _resolve(name)]
    shards = [Path(name).expanduser() for name in names]
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        raise DataError(
            f"shards {pattern!r}: {len(missing)} of {len(shards)} are missing, the first is {missing[0]}; "
            f"correct the range, or {_HOW_TO_MAKE}"
        )
    return shards


def _expand(pattern: str) -> list[str]:
    """Every name of a pattern with `{000..009}` ranges; the zeros of the first number give the width."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found.group(1)), int(found.group(2))
    if last < first:
        raise DataError(f"shards {pattern!r}: the range {found.group(0)} runs backwards")
    width = len(found.group(1))
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for number in range(first, last + 1) for name in _expand(f"{head}{number:0{width}}{tail}")]


def _open_folder(folder: Path) -> None:
    """Raise OSError where a folder cannot be listed; to `glob` such a folder is empty."""
    with os.scandir(folder):
        pass


def _resolve_folder(folder: Path) -> list[Path]:
    _open_folder(folder)
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return shards
    deeper = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    hint = f"its folders {', '.join(deeper)} hold some: name one of them" if deeper else _HOW_TO_MAKE
    raise DataError(f"shards '{folder}': the folder holds no .tar; {hint}")
