"""What the samples of shards hold, as far as the names of members and the facts of the index tell.

Enter: shard indexes, and the codecs that are to read them. Leave: which modalities and labels stand together in
samples. Refused: a shard in which no sample has all that codecs require, and codecs that no shard holds anything for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import ShardIndex
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


@dataclass(frozen=True)
class Holdings:
    """What one shard holds for the codecs of a run."""

    shard: Path
    num_samples: int
    extensions: tuple[str, ...]
    """Every extension of its members."""
    together: frozenset[frozenset[str]]
    """For each kind of sample the codecs that find members in it."""


def holdings_of(index: ShardIndex, codecs: Mapping[str, Codec]) -> Holdings:
    kinds = np.zeros(index.num_samples, np.int64)
    for number, codec in enumerate(codecs.values()):
        kinds |= _held(index, codec.extensions).astype(np.int64) << number
    together = frozenset(
        frozenset(name for number, name in enumerate(codecs) if kind >> number & 1)
        for kind in np.unique(kinds).tolist()
    )
    return Holdings(index.shard, index.num_samples, index.extensions, together)


def _held(index: ShardIndex, extensions: frozenset[str]) -> NDArray[np.bool_]:
    """[samples] Whether there is a member to read; the index knows whether a .json holds captions or other things."""
    if extensions == CAPTION_EXTENSIONS:
        return index.facts.captions > 0
    return index.holds(extensions)


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
