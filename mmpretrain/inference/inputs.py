"""What a command is to read: a folder of media, shards, or a table of texts, as samples in a fixed order.

Enter: a path or a pattern of shards. Leave: samples by number, each read only when asked for. Refused: paths that are
not there, folders without files, tables without a column of texts.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from data_pipeline.pack_sources import CAPTION_COLUMNS, choose_column, read_rows
from data_pipeline.reader import SampleReader, open_sources
from data_pipeline.remote import RemoteShard
from mmpretrain.core.captions import TEXT_EXTENSION, usable_text
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.folders import leads_out
from mmpretrain.core.media_types import MEDIA_EXTENSIONS, sniff
from mmpretrain.inference.media import read_file

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
KEY_COLUMNS = ("key", "id", "image", "file_name", "filename", "file", "path")
Kind = Literal["folder", "shards", "table"]


@dataclass(frozen=True)
class Name:
    """Which sample it is."""

    key: str
    """Unique in its input but for texts of the same key."""
    path: str
    """The file it stands in: itself, its shard, or its table."""
    ordinal: int
    """Its number in the shard or table; 0 for a file of its own."""


class SampleInputs(ABC):
    """Samples in a fixed order."""

    kind: Kind

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, number: int) -> Name: ...

    @abstractmethod
    def read(self, number: int) -> Mapping[str, bytes]:
        """Extension -> content, the extension told by the content. SampleError says why it cannot be read."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Sixteen hex digits that change with the files, their sizes and times."""


def open_inputs(given: str, text_column: str | None = None, by_stem: bool = False) -> SampleInputs:
    """Tell by what is there which kind of input it is; `by_stem`: files that differ in their suffix are one sample."""
    path = Path(given)
    if path.is_file() and path.suffix.lower() in TABLES:
        return TextTable(path, text_column)
    if path.is_dir() and not any(path.glob("*.tar")):
        return MediaFolder(path, _files(path), by_stem)
    if path.is_file() and path.suffix != ".tar":
        return MediaFolder(path.parent, [path], by_stem, links=True)
    return Shards(given)


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    if not files:
        raise DataError(f"{folder} holds no files; name a folder of media, shards or a table of texts")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class MediaFolder(SampleInputs):
    """Files, told apart by their content."""

    kind: Kind = "folder"

    def __init__(self, folder: Path, files: Sequence[Path], by_stem: bool, links: bool = False) -> None:
        """`links`: they may lead out of the folder, where each file was named by the user."""
        self._folder, self._links = folder, links
        groups: dict[str, list[Path]] = {}
        for path in files:
            relative = path.relative_to(folder)
            groups.setdefault(str(relative.with_suffix("")) if by_stem else str(relative), []).append(path)
        self._groups = list(groups.items())

    def __len__(self) -> int:
        return len(self._groups)

    def name(self, number: int) -> Name:
        key, paths = self._groups[number]
        return Name(key, str(paths[0].absolute()), 0)

    def read(self, number: int) -> Mapping[str, bytes]:
        members: dict[str, bytes] = {}
        for path in self._groups[number][1]:
            if not self._links and leads_out(path, self._folder):
                raise SampleError(
                    f"{path.name} is a link that leads out of {self._folder}; copy the file itself (cp -L)"
                )
            content = read_file(path)
            suffix = path.suffix.lower().removeprefix(".")
            extension = TEXT_EXTENSION if suffix == TEXT_EXTENSION else sniff(content)
            if extension is None and suffix in MEDIA_EXTENSIONS:
                raise SampleError(_why_unknown(content))
            members |= {} if extension is None else {extension: content}
        return members

    @cached_property
    def digest(self) -> str:
        return _digest([path for _, paths in self._groups for path in paths])


def _why_unknown(content: bytes) -> str:
    if not content:
        return "the file is empty"
    return f"its content is of no known media type; it begins with {content[:8]!r}"


class Shards(SampleInputs):
    """Samples of WebDataset shards."""

    kind: Kind = "shards"

    def __init__(self, pattern: str) -> None:
        (self._source,) = open_sources({"input": [pattern]})
        self._reader = SampleReader([self._source])

    def __len__(self) -> int:
        return self._source.num_samples

    def name(self, number: int) -> Name:
        place = self._reader.find(0, number)
        return Name(place.key, place.shard, place.ordinal)

    def read(self, number: int) -> Mapping[str, bytes]:
        return self._reader.find(0, number).read().members

    @cached_property
    def digest(self) -> str:
        remote = [shard for shard in self._source.shards if isinstance(shard, RemoteShard)]
        if not remote:
            return _digest([shard for shard in self._source.shards if isinstance(shard, Path)])
        told = [*map(str, self._source.shards), *self._source.num_bytes.tolist()]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


class TextTable(SampleInputs):
    """One text a row, or a list of them."""

    kind: Kind = "table"

    def __init__(self, table: Path, column: str | None) -> None:
        self._table, rows = table, list(read_rows(table))
        if not rows:
            raise DataError(f"{table} holds no rows; it needs a column of texts")
        texts = choose_column(table, rows[0], column, CAPTION_COLUMNS, "--text-column")
        keys = next((name for name in rows[0] if name.strip().lower() in KEY_COLUMNS), None)
        self._rows = list(_texts(table, rows, texts, keys))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, number: int) -> Name:
        return Name(self._rows[number][0], str(self._table.absolute()), number)

    def read(self, number: int) -> Mapping[str, bytes]:
        text = self._rows[number][1]
        if not text.strip():
            raise SampleError("the text is blank")
        return {TEXT_EXTENSION: usable_text(text).encode()}

    @cached_property
    def digest(self) -> str:
        return _digest([self._table])


def _texts(
    table: Path, rows: Sequence[Mapping[str, object]], column: str, keys: str | None
) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows):
        value = row.get(column)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str | None):
                raise DataError(f"{table}: row {number + 1}, column {column!r} is no text: {text!r}")
            yield str(number if keys is None else row.get(keys)), text or ""


def _digest(paths: Sequence[Path]) -> str:
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
