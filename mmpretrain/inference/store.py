"""Embeddings on disk: rows of key, path, ordinal, modality, text and vector, and which model made them.

Enter: tables of rows, part by part. Leave: one Parquet file, or a folder with `vectors.npy`, `rows.jsonl` and
`embeddings.json`; each appears whole or not at all. Refused: files that are no embeddings, damaged ones.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import record_of

Format = Literal["parquet", "npy"]
Vectors = NDArray[np.float32]
_KEY = b"mmpretrain"
_VECTORS, _ROWS, _HEADER = "vectors.npy", "rows.jsonl", "embeddings.json"


@dataclass(frozen=True)
class Header:
    """What made the embeddings, and of what."""

    model: str
    """Fingerprint of the model."""
    source: str
    """Where the model lay."""
    embed_dim: int
    inputs: str
    """The folder, shards or table that was embedded."""


@dataclass(frozen=True)
class EmbeddedRow:
    """What one vector stands for."""

    key: str
    path: str
    """The file it comes from: media, shard or table."""
    ordinal: int
    """Number of the sample in its shard or table; 0 for a file of its own."""
    modality: str
    text: str | None
    """The text itself, where it is one."""


@dataclass(frozen=True)
class Embeddings:
    """Vectors and what they stand for, row by row."""

    header: Header
    rows: Sequence[EmbeddedRow]
    vectors: Vectors
    """[rows, embed_dim], of unit length."""


def table_of(rows: Sequence[EmbeddedRow], vectors: Vectors) -> pyarrow.Table:
    """The rows of a part; vectors is [rows, embed_dim]."""
    columns = {name: [getattr(row, name) for row in rows] for name in ("key", "path", "ordinal", "modality", "text")}
    flat = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
    stacked = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pyarrow.table([*columns.values(), stacked], schema=_schema(vectors.shape[1]))


def write_part(path: Path, table: pyarrow.Table, record: Mapping[str, object]) -> None:
    """One part with a record of its own, whole or not at all."""
    unfinished = _unfinished(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({_KEY: json.dumps(record)}), unfinished)
    unfinished.replace(path)


def read_record(path: Path) -> dict[str, object]:
    """What `write_part` was given beside the table."""
    record: dict[str, object] = json.loads(pyarrow.parquet.read_schema(path).metadata[_KEY])
    return record


def join_parts(parts: Sequence[Path], out: Path, layout: Format, header: Header) -> None:
    """All parts as one file, or as one folder of NumPy's format."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(out)
    if layout == "parquet":
        schema = _schema(header.embed_dim).with_metadata({_KEY: json.dumps(asdict(header))})
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            for table in map(pyarrow.parquet.read_table, parts):
                writer.write_table(table.cast(schema))
        unfinished.replace(out)
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    _write_npy(parts, unfinished, header)
    unfinished.replace(out)


def read_embeddings(path: Path) -> Embeddings:
    """Read what `join_parts` wrote; a folder may hold either."""
    if path.is_dir() and (path / _HEADER).is_file():
        return _read_npy(path)
    if not path.is_file():
        raise DataError(f"{path} holds no embeddings; make some with `mmpretrain embed MODEL INPUT --out {path}`")
    try:
        table = pyarrow.parquet.read_table(path)
        header = record_of(Header, parse_json((table.schema.metadata or {})[_KEY]))
        flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        rows = [record_of(EmbeddedRow, row) for row in table.drop_columns("vector").to_pylist()]
        return Embeddings(header, rows, flat.reshape(len(rows), header.embed_dim))
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no file of embeddings that `mmpretrain embed` wrote: {error!r}") from error


def _schema(embed_dim: int) -> pyarrow.Schema:
    texts = [(name, pyarrow.string()) for name in ("key", "path")]
    rest = [("ordinal", pyarrow.int64()), ("modality", pyarrow.string()), ("text", pyarrow.string())]
    return pyarrow.schema([*texts, *rest, ("vector", pyarrow.list_(pyarrow.float32(), embed_dim))])


def _write_npy(parts: Sequence[Path], folder: Path, header: Header) -> None:
    counts = [pyarrow.parquet.read_metadata(part).num_rows for part in parts]
    shape = (sum(counts), header.embed_dim)
    vectors = np.lib.format.open_memmap(folder / _VECTORS, mode="w+", dtype=np.float32, shape=shape)
    with (folder / _ROWS).open("w", encoding="utf-8") as file:
        for begin, table in zip(np.cumsum([0, *counts]).tolist(), _tables(parts), strict=False):
            flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors[begin : begin + table.num_rows] = flat.reshape(-1, header.embed_dim)
            file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in table.drop_columns("vector").to_pylist()
            )
    vectors.flush()
    (folder / _HEADER).write_text(json.dumps(asdict(header), indent=2) + "\n", encoding="utf-8")


def _tables(parts: Sequence[Path]) -> Iterator[pyarrow.Table]:
    return map(pyarrow.parquet.read_table, parts)


def _read_npy(folder: Path) -> Embeddings:
    try:
        header = record_of(Header, parse_json((folder / _HEADER).read_text(encoding="utf-8")))
        # mapped, so that a shape which the file does not hold takes no memory
        vectors = np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
        lines = (folder / _ROWS).read_text(encoding="utf-8").splitlines()
        rows = [record_of(EmbeddedRow, parse_json(line)) for line in lines]
    except (OSError, ValueError, TypeError, EOFError, SyntaxError, OverflowError, MemoryError, TokenError) as error:
        raise DataError(f"{folder} is no folder of embeddings that `mmpretrain embed` wrote: {error}") from error
    if vectors.shape != (len(rows), header.embed_dim) or vectors.dtype != np.float32:
        raise DataError(f"{folder}: {_VECTORS} is {list(vectors.shape)}, {_ROWS} has {len(rows)} rows; embed again")
    return Embeddings(header, rows, np.array(vectors))


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")
