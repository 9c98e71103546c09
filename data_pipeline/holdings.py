"""What the samples of shards hold, as far as the names of members and the facts of the index tell.

Enter: shard indexes, and the codecs that are to read them. Leave: which modalities and labels stand together in
samples. Refused: a shard in which no sample has all that codecs require, and codecs that no shard holds anything for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.index import ShardIndex
from data_pipeline.remote import Shard
from mmpretrain.core.captions import CAPTION_EXTENSIONS, METADATA_EXTENSION, TEXT_EXTENSION
from mmpretrain.core.errors import DataError
from mmpretrain.core.media_types import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from mmpretrain.core.types import Codec

_CONTENTS = {
    "image": IMAGE_EXTENSIONS,
    "audio": AUDIO_EXTENSIONS,
    "video": VIDEO_EXTENSIONS,
    "text": frozenset({TEXT_EXTENSION}),
    "captions or labels": frozenset({METADATA_EXTENSION}),
}


class Kind(NamedTuple):
    """What some samples have in common."""

    extensions: frozenset[str]
    """Of their members."""
    captioned: bool
    """A .json may hold captions or other things; the index knows."""


@dataclass(frozen=True)
class Holdings:
    """What one shard holds for the codecs of a run."""

    shard: Shard
    num_samples: int
    extensions: tuple[str, ...]
    """Every extension of its members."""
    together: frozenset[frozenset[str]]
    """For each kind of sample the codecs that find members in it."""


def kinds_of(index: ShardIndex) -> frozenset[Kind]:
    """The kinds of samples of a shard."""
    rows = np.repeat(np.arange(index.num_samples), np.diff(index.member_end, prepend=0))
    holds = np.zeros((index.num_samples, len(index.extensions) + 1), np.bool_)
    holds[rows, index.member_extension] = True
    holds[:, -1] = index.facts.captions > 0
    differs = (holds[1:] != holds[:-1]).any(axis=1)  # neighbours are mostly alike, and finding unique rows is slow
    holds = holds[np.flatnonzero(np.concatenate(([True], differs)))]
    names = np.array(index.extensions, np.object_)
    return frozenset(Kind(frozenset(names[kind[:-1]].tolist()), bool(kind[-1])) for kind in np.unique(holds, axis=0))


def holdings_of(index: ShardIndex, codecs: Mapping[str, Codec]) -> Holdings:
    return holdings_for(index.shard, index.num_samples, kinds_of(index), codecs)


def holdings_for(shard: Shard, num_samples: int, kinds: frozenset[Kind], codecs: Mapping[str, Codec]) -> Holdings:
    """The same without the index; shards that hold the same share what is said of it."""
    reads = tuple((name, codec.extensions) for name, codec in codecs.items())
    return Holdings(shard, num_samples, *_told(kinds, reads))


@lru_cache(maxsize=1024)
def _told(
    kinds: frozenset[Kind], reads: tuple[tuple[str, frozenset[str]], ...]
) -> tuple[tuple[str, ...], frozenset[frozenset[str]]]:
    extensions = frozenset[str]().union(*(kind.extensions for kind in kinds))
    together = frozenset(frozenset(name for name, read in reads if _finds(kind, read)) for kind in kinds)
    return tuple(sorted(extensions)), together


def _finds(kind: Kind, extensions: frozenset[str]) -> bool:
    return kind.captioned if extensions == CAPTION_EXTENSIONS else not extensions.isdisjoint(kind.extensions)


def require_pairs(shard: Holdings, codecs: Mapping[str, Codec]) -> None:
    """Refuse a shard in which no sample has a member for every codec that requires one."""
    required = {name: codec.extensions for name, codec in codecs.items() if codec.required}
    if any(held.issuperset(required) for held in shard.together):
        return
    wanted = "; ".join(f"{name}: one of .{', .'.join(sorted(found))}" for name, found in required.items())
    raise DataError(
        f"{shard.shard} is a tar without pairs: none of its {shard.num_samples} samples has all of ({wanted}); "
        f"it holds {in_words(shard.extensions)}; a modality that samples may lack needs data.codecs.<name>.missing "
        f"to be weightless"
    )


def require_some(shards: Iterable[Holdings], codecs: Mapping[str, Codec]) -> None:
    """Refuse codecs for which no sample of any shard has a member."""
    listed = list(shards)
    held = frozenset[str]().union(*(kind for shard in listed for kind in shard.together))
    for name, codec in codecs.items():
        if name not in held:
            extensions = sorted({extension for shard in listed for extension in shard.extensions})
            raise DataError(
                f"no shard holds {name}, which data.codecs.{name} reads from .{', .'.join(sorted(codec.extensions))}; "
                f"the {len(listed)} shards hold {in_words(extensions)}; add shards that hold {name}, or remove the "
                f"codec with what uses it"
            )


def in_words(extensions: Iterable[str]) -> str:
    """What stands in members of these extensions: "image (.jpg, .png), text (.txt), .cls"."""
    seen = set(extensions)
    named = [f"{name} (.{', .'.join(sorted(seen & known))})" for name, known in _CONTENTS.items() if seen & known]
    others = sorted(seen.difference(*_CONTENTS.values()))
    return ", ".join(named + [f".{name}" for name in others[:12]])
