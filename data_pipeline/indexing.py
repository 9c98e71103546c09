"""`data index`: an index beside every shard, all faults in one go.

Enter: folders, globs or tars. Leave: `<shard>.tar.index` for each, and a table of what they hold. Refused: shards that
cannot be indexed, each named with its fault; shards that changed since, unless `rebuild`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.index import ShardIndex, build_index, load_or_build_index, save_index
from data_pipeline.parallel import run_parallel
from data_pipeline.part import Part
from data_pipeline.shards import resolve_shards
from mmpretrain.core.errors import DataError


@dataclass(frozen=True)
class IndexSummary:
    """What the indexed shards hold together."""

    shards: int
    samples: int
    bytes: int
    ignored: int
    """Members that belong to no sample."""


@dataclass(frozen=True)
class _Outcome:
    index: ShardIndex | None
    fault: str


def index_shards(
    patterns: Iterable[str], rebuild: bool = False, workers: int | None = None, part: Part | None = None
) -> IndexSummary:
    """Index all shards, or those of a part; those with a fault are named together, after the others were indexed."""
    shards = resolve_shards(patterns)
    shards = shards if part is None else part.take(shards)
    outcomes = run_parallel(partial(_index, rebuild), shards, workers, "indexing")
    faults = [outcome.fault for outcome in outcomes if outcome.index is None]
    if faults:
        raise DataError(f"{len(faults)} of {len(shards)} shards cannot be indexed:\n  " + "\n  ".join(faults))
    indexes = [outcome.index for outcome in outcomes if outcome.index is not None]
    summary = IndexSummary(
        shards=len(indexes),
        samples=sum(index.num_samples for index in indexes),
        bytes=sum(index.shard_bytes for index in indexes),
        ignored=sum(index.ignored for index in indexes),
    )
    table = Table("shards", "samples", "bytes", "members outside samples")
    table.add_row(*(f"{value:,}" for value in vars(summary).values()))
    Console().print(table)
    return summary


def _index(rebuild: bool, shard: Path) -> _Outcome:
    try:
        if not rebuild:
            return _Outcome(load_or_build_index(shard), "")
        index = build_index(shard)
    except DataError as error:
        return _Outcome(None, str(error))
    save_index(index)
    return _Outcome(index, "")
