"""From a folder of media and a table of captions to a list of samples with safe, unique keys.

Enter: the folder and a .csv, .tsv, .jsonl or .parquet with a column of file names and one of captions; perhaps further
folders whose files join those of the same name, whatever their suffix. Leave: `PackEntry`s sorted by key, and the files
that are named but absent, or lead out of the folder. Refused: a table whose columns cannot be told, rows without a
name, an empty table, further folders in which two files would join the same sample or a link leads out.
"""

import csv
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow
import pyarrow.parquet

from mmpretrain.core.captions import usable_texts
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.folders import leads_out
from mmpretrain.core.json_text import parse_json

MEDIA_COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "filepath", "media", "video", "audio")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "description")

Row = dict[str, object]


@dataclass(frozen=True)
class PackEntry:
    """One sample to be packed."""

    key: str
    path: str
    """Relative to the folder, as in the table."""
    captions: tuple[str, ...]
    joined: tuple[Path, ...] = ()
    """Files of further folders that belong to the same sample."""


@dataclass(frozen=True)
class Dropped:
    """A media file that the table names and no shard holds."""

    path: str
    reason: str


def read_captions(table: Path, media_column: str | None, caption_column: str | None) -> dict[str, list[str]]:
    """Media path -> its captions, both in the order of the table; rows without a caption leave an empty list."""
    rows = read_rows(table)
    try:
        first = next(rows)
    except StopIteration as error:
        raise DataError(f"{table} holds no rows; it needs a column of file names and one of captions") from error
    media = choose_column(table, first, media_column, MEDIA_COLUMNS, "--image-column")
    caption = choose_column(table, first, caption_column, CAPTION_COLUMNS, "--caption-column")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(itertools.chain([first], rows), 1):
        name = row.get(media)
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{table}: row {number} names no file in column {media!r}: {name!r}")
        path = str(PurePosixPath(name.strip()))
        captions.setdefault(path, []).extend(_captions_in(row.get(caption), table, number, caption))
    return captions


def plan_entries(
    folder: Path, captions: dict[str, list[str]], further: Sequence[Path] = ()
) -> tuple[list[PackEntry], list[Dropped]]:
    """Entries sorted by key, and what can be told to be unusable without reading it."""
    joining = [_files_by_name(other) for other in further]
    usable: list[str] = []
    dropped: list[Dropped] = []
    for path in sorted(captions):
        reason = _why_unusable(folder, path, captions[path])
        if reason is None:
            usable.append(path)
        else:
            dropped.append(Dropped(path, reason))
    keys = safe_keys(usable)
    entries = [
        PackEntry(
            key, path, tuple(captions[path]), tuple(files[_name(path)] for files in joining if _name(path) in files)
        )
        for key, path in zip(keys, usable, strict=True)
    ]
    return sorted(entries, key=lambda entry: entry.key), dropped


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Name without suffix, relative to the folder -> the file."""
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if leads_out(path, folder):
            raise DataError(f"{path} is a link that leads out of {folder}; copy the file itself (cp -L), or remove it")
        other = files.setdefault(_name(path.relative_to(folder).as_posix()), path)
        if other != path:
            raise DataError(f"{other} and {path} would join the same sample; keep one of them in {folder}")
    if not files:
        raise DataError(f"the folder {folder} of further media holds no files")
    return files


def _name(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def safe_keys(paths: list[str]) -> list[str]:
    """Keys without dots or slashes, which readers split names at; names that would meet get their checksum added."""
    plain = [re.sub(r"[^\w-]", "_", str(PurePosixPath(path).with_suffix(""))) for path in paths]
    count = Counter(plain)
    taken = {key for key in plain if count[key] == 1}
    keys = []
    for path, key in zip(paths, plain, strict=True):
        chosen = key if count[key] == 1 else f"{key}-{zlib.crc32(path.encode()):08x}"
        while count[key] > 1 and chosen in taken:
            chosen += "_"
        taken.add(chosen)
        keys.append(chosen)
    return keys


def _why_unusable(folder: Path, path: str, captions: list[str]) -> str | None:
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        return f"the name leads out of {folder}"
    try:
        stands = (folder / path).is_file()
    except OSError as error:
        return f"the name cannot be looked up: {error.strerror}"
    if not stands:
        return f"there is no such file in {folder}"
    if leads_out(folder / path, folder):
        return f"it is a link that leads out of {folder}; copy the file itself (cp -L)"
    return None if captions else "no row gives it a caption"


def read_rows(table: Path) -> Iterator[Row]:
    """The rows of a CSV, TSV, JSONL or Parquet file, column -> value."""
    if not table.is_file():
        raise DataError(f"captions file {table} does not exist")
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _csv_rows(table, "\t" if kind == ".tsv" else ",")
    if kind in (".jsonl", ".ndjson"):
        return _jsonl_rows(table)
    if kind == ".parquet":
        return _parquet_rows(table)
    raise ConfigError(
        f"captions file {table}: {kind or 'no extension'} is not read; give .csv, .tsv, .jsonl or .parquet"
    )


def _csv_rows(table: Path, delimiter: str) -> Iterator[Row]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, delimiter=delimiter, strict=True), 1):
                if None in row or None in row.values():
                    raise DataError(f"{table}: row {number} has another number of columns than the header: {row}")
                yield dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{table} is no readable CSV: {error}") from error


def _jsonl_rows(table: Path) -> Iterator[Row]:
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise DataError(f"{table}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{table}: line {number} holds a {type(row).__name__}, not an object")
            yield row


def _parquet_rows(table: Path) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{table} is no readable Parquet: {error}") from error


def choose_column(table: Path, row: Row, asked: str | None, known: Iterable[str], option: str) -> str:
    columns = ", ".join(row)
    if asked is not None:
        if asked not in row:
            raise ConfigError(f"{option} {asked!r}: {table} has no such column; it has {columns}")
        return asked
    lower = {name.strip().lower(): name for name in row}
    found = [lower[name] for name in known if name in lower]
    if len(found) == 1:
        return found[0]
    what = f"several columns could be it ({', '.join(found)})" if found else f"none of the columns ({columns}) is it"
    raise ConfigError(f"{table}: {what}; name the right one with {option}; known are {', '.join(known)}")


def _captions_in(value: object, table: Path, number: int, column: str) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    try:
        return usable_texts(values, f"what stands there is neither text nor a list of text: {value!r}")
    except SampleError as error:
        raise DataError(f"{table}: row {number}, column {column!r}: {error}") from error
