"""Which shards a list of folders, globs and brace ranges names.

Enter: patterns from a config or a command line. Leave: existing local tars, sorted within each pattern. Refused:
`pipe:` and remote shards, patterns that match nothing, a range with holes, a shard named twice.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from mmpretrain.core.errors import DataError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HOW_TO_MAKE = "make shards with `mmpretrain data pack FOLDER --captions FILE --out DIR`"


def resolve_shards(patterns: Iterable[str]) -> list[Path]:
    """The shards in a fixed order: as the patterns stand, and by name within a pattern."""
    shards = [shard for pattern in patterns for shard in _resolve(pattern)]
    if not shards:
        raise DataError(f"no shards are named; list folders, globs or tars under `shards:`, or {_HOW_TO_MAKE}")
    seen: set[Path] = set()
    for shard in shards:
        if shard.resolve() in seen:
            raise DataError(
                f"shard {shard} is named twice; name it once, and use the source's `weight` to see it more often"
            )
        seen.add(shard.resolve())
    return shards


def _resolve(pattern: str) -> list[Path]:
    _refuse_scheme(pattern)
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
        f"shards {pattern!r}: remote shards ({scheme.group(1)}:) are not supported yet by the indexed reader; "
        f"copy them to a local or mounted folder and name that"
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


def _resolve_folder(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("*.tar"))
    if shards:
        return shards
    deeper = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    hint = f"its folders {', '.join(deeper)} hold some: name one of them" if deeper else _HOW_TO_MAKE
    raise DataError(f"shards '{folder}': the folder holds no .tar; {hint}")
