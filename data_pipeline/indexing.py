"""`data index`: an index beside every shard, all faults in one go.

Enter: folders, globs, tars or addresses. Leave: `<shard>.tar.index` for each, `collection.index` for each local folder
that was indexed in full, and a table of what they hold. Refused: shards that cannot be indexed, each named with its
fault; shards that changed since, unless `rebuild`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.collection import Contents, contents_of, save_collection
from data_pipeline.index import build_index, load_or_build_index, save_index
from data_pipeline.parallel import run_parallel
from data_pipeline.part import Part
from data_pipeline.remote import Shard
from data_pipeline.shards import resolve_shards
from mmpretrain.core.errors import DataError

_LOG = logging.getLogger(__name__)


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
    shard: Shard
    contents: Contents | None
    ignored: int = 0
    fault: str = ""


def index_shards(
    patterns: Iterable[str], rebuild: bool = False, workers: int | None = None, part: Part | None = None
) -> IndexSummary:
    """Index all shards, or those of a part; those with a fault are named together, after the others were indexed."""
    shards = resolve_shards(patterns)
    shards = shards if part is None else part.take(shards)
    outcomes = run_parallel(partial(_index, rebuild), shards, workers, "indexing")
    faults = [outcome.fault for outcome in outcomes if outcome.contents is None]
    if faults:
        raise DataError(f"{len(faults)} of {len(shards)} shards cannot be indexed:\n  " + "\n  ".join(faults))
    contents = {outcome.shard: outcome.contents for outcome in outcomes if outcome.contents is not None}
    if part is None:  # parts run at the same time; a last call without one joins them
        _save_collections(contents)
    summary = IndexSummary(
        shards=len(contents),
        samples=sum(one.num_samples for one in contents.values()),
        bytes=sum(one.num_bytes for one in contents.values()),
        ignored=sum(outcome.ignored for outcome in outcomes),
    )
    table = Table("shards", "samples", "bytes", "members outside samples")
    table.add_row(*(f"{value:,}" for value in vars(summary).values()))
    Console().print(table)
    return summary


def _save_collections(contents: Mapping[Shard, Contents]) -> None:
    folders: dict[Path, dict[str, Contents]] = {}
    for shard, told in contents.items():
        if isinstance(shard, Path):
            folders.setdefault(shard.parent, {})[shard.name] = told
    for folder, collection in folders.items():
        try:
            save_collection(folder, collection)
        except OSError as error:
            _LOG.warning("%s has no collection.index (%s); opening its shards takes longer", folder, error.strerror)


def _index(rebuild: bool, shard: Shard) -> _Outcome:
    try:
        if rebuild:
            index = build_index(shard)
            save_index(index)
        else:
            index = load_or_build_index(shard)
    except DataError as error:
        return _Outcome(shard, None, fault=str(error))
    return _Outcome(shard, contents_of(index), index.ignored)
