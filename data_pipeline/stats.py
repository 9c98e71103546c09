"""`data stats`: how many samples, how large, how many captions, from the indexes alone.

Enter: folders, globs or tars. Leave: a `DataStats` and its table. Refused: shards that cannot be indexed. No member is
read where an index stands.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.parallel import run_parallel
from data_pipeline.shards import resolve_shards

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class Extension:
    """All members of one extension."""

    members: int
    bytes: int


@dataclass(frozen=True)
class DataStats:
    """Quantiles are at QUANTILES, over the samples that have the thing; an empty tuple where none has."""

    shards: int
    samples: int
    bytes: int
    samples_per_shard: tuple[float, ...]
    width: tuple[float, ...]
    height: tuple[float, ...]
    captions: int
    captions_per_sample: tuple[float, ...]
    characters: tuple[float, ...]
    """Of the longest caption of each sample."""
    extensions: Mapping[str, Extension]


def stats(patterns: Iterable[str], workers: int | None = None) -> DataStats:
    """Gather and show."""
    indexes = run_parallel(load_or_build_index, resolve_shards(patterns), workers, "reading indexes")
    captions = np.concatenate([index.facts.captions for index in indexes])
    found = DataStats(
        shards=len(indexes),
        samples=sum(index.num_samples for index in indexes),
        bytes=sum(index.shard_bytes for index in indexes),
        samples_per_shard=_quantiles([np.array([index.num_samples]) for index in indexes]),
        width=_quantiles([index.facts.width for index in indexes]),
        height=_quantiles([index.facts.height for index in indexes]),
        captions=int(captions.sum()),
        captions_per_sample=_quantiles([captions]),
        characters=_quantiles([index.facts.characters for index in indexes]),
        extensions=_extensions(indexes),
    )
    _show(found)
    return found


def _quantiles(parts: Sequence[NDArray[np.integer]]) -> tuple[float, ...]:
    values = np.concatenate(parts).astype(np.float64)
    present = values[values > 0]
    return tuple(np.quantile(present, QUANTILES, method="nearest").tolist()) if len(present) else ()


def _extensions(indexes: list[ShardIndex]) -> dict[str, Extension]:
    members, sizes = Counter[str](), Counter[str]()
    for index in indexes:
        count = len(index.extensions)
        members.update(dict(zip(index.extensions, np.bincount(index.member_extension, minlength=count), strict=True)))
        weights = np.bincount(index.member_extension, weights=index.member_size, minlength=count)
        sizes.update(dict(zip(index.extensions, weights.astype(np.int64), strict=True)))
    return {name: Extension(int(members[name]), int(sizes[name])) for name in sorted(members)}


def _show(found: DataStats) -> None:
    console = Console()
    console.print(
        f"{found.shards:,} shards, {found.samples:,} samples, {found.captions:,} captions, {_size(found.bytes)}",
        highlight=False,
    )
    table = Table("", "smallest", "5 %", "median", "95 %", "largest")
    for label, quantiles in (
        ("samples per shard", found.samples_per_shard),
        ("image width, pixels", found.width),
        ("image height, pixels", found.height),
        ("captions per sample", found.captions_per_sample),
        ("longest caption, characters", found.characters),
    ):
        if quantiles:
            table.add_row(label, *(f"{value:,.0f}" for value in quantiles))
    console.print(table)
    table = Table("member", "count", "bytes", "bytes each")
    for name, extension in found.extensions.items():
        each = _size(extension.bytes / extension.members)
        table.add_row(f".{name}", f"{extension.members:,}", _size(extension.bytes), each)
    console.print(table)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} TB"
