"""One WebDataset shard with its index, whole or not at all.

Enter: samples as `webdataset.TarWriter` takes them, every member as bytes. Leave: the tar under an unfinished name and
its index under the final one; `finish_shard` renames, and only then the shard counts. Refused: nothing of its own.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import webdataset

from data_pipeline.index import build_index, save_index

FIXED_TIME = 0
"""Modification time of every member, so that the same input gives the same bytes."""


def write_unfinished(shard: Path, samples: Iterable[Mapping[str, str | bytes]]) -> int:
    """Write everything but the final name; the number of samples, and no file at all where it is 0."""
    unfinished = unfinished_path(shard)
    count = 0
    with unfinished.open("wb") as file:
        with webdataset.TarWriter(file, mtime=FIXED_TIME, encoder=False) as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        file.flush()
        os.fsync(file.fileno())
    if count:
        save_index(replace(build_index(unfinished), shard=shard))
    else:
        unfinished.unlink()
    return count


def finish_shard(shard: Path) -> None:
    unfinished_path(shard).replace(shard)


def unfinished_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.unfinished")


def shard_paths(folder: Path, count: int) -> list[Path]:
    """00000.tar, 00001.tar, ...: at least five digits, so that names sort as numbers."""
    digits = max(5, len(str(count - 1)))
    return [folder / f"{number:0{digits}}.tar" for number in range(count)]
