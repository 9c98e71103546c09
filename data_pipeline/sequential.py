"""Every sample of some shards once, in shard order and without augmentation, for evaluation.

Enter: shards, the codecs and this rank among its peers. Leave: this rank's samples, decoded, with their members.
Refused: shards that cannot be read. A sample that cannot be decoded is left out and reported.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.collate import BatchRows
from data_pipeline.config import CacheConfig
from data_pipeline.loader import decode
from data_pipeline.order import locate
from data_pipeline.reader import Place, SampleReader, open_sources
from mmpretrain.core.errors import SampleError
from mmpretrain.core.ranks import World
from mmpretrain.core.types import Codec, Skip, TensorDict


@dataclass(frozen=True)
class SampleRows:
    """Some samples in shard order."""

    tensors: TensorDict
    """The codecs' fields, one row for each key."""
    keys: tuple[str, ...]
    """Sample keys as in a training batch."""
    members: tuple[Mapping[str, bytes], ...]
    """The undecoded members of each row."""
    skips: tuple[Skip, ...]
    """Samples of this stretch that could not be decoded; their position is their number in shard order."""


def iterate_all(
    patterns: Mapping[str, Sequence[str]],
    codecs: Mapping[str, Codec],
    batch_rows: int,
    world: World,
    max_samples: int | None = None,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
) -> Iterator[SampleRows]:
    """This rank's contiguous part of all samples, at most `batch_rows` at a time; each stands on exactly one rank.

    `patterns` maps source names to shards. Parts differ by at most one sample, and by those that are left out.
    """
    reader = SampleReader(open_sources(patterns, codecs, cache=cache))
    ends = np.cumsum([source.num_samples for source in reader.sources], dtype=np.int64)
    total = int(ends[-1]) if max_samples is None else min(max_samples, int(ends[-1]))
    mine = range(total * world.rank // world.size, total * (world.rank + 1) // world.size)
    for start in range(mine.start, mine.stop, batch_rows):
        numbers = np.arange(start, min(start + batch_rows, mine.stop))
        sources, samples = locate(numbers, ends)
        # one at a time: finding a later place may close the shard of an earlier one
        places = (reader.find(*where) for where in zip(sources.tolist(), samples.tolist(), strict=True))
        yield _read(places, BatchRows(codecs, len(numbers)), codecs, start)


def _read(places: Iterable[Place], rows: BatchRows, codecs: Mapping[str, Codec], start: int) -> SampleRows:
    keys, skips = list[str](), list[Skip]()
    members: list[Mapping[str, bytes]] = []
    for number, place in enumerate(places, start):
        try:
            raw = place.read()
            rows.put(len(keys), decode(codecs, raw.members, None))
        except SampleError as error:
            skips.append(Skip(place.source, place.shard, place.ordinal, place.key, number, str(error)))
            continue
        keys.append(place.full_key)
        members.append(raw.members)
    return SampleRows(rows.tensors(len(keys)), tuple(keys), tuple(members), tuple(skips))
