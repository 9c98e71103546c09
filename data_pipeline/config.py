"""What a run reads and how: sources and their weights, the tokenizer, worker processes, the budget of bad samples.

Enter: the `data:` part of a run config. Leave: `DataConfig`, without the codecs, which the run config adds. Refuses
weights that cannot be mixed exactly and changes of weights that are out of order.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.mixture import integer_shares
from mmpretrain.core.config import Config, Rule
from mmpretrain.core.errors import ConfigError


class SourceConfig(Config):
    """One set of shards."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders, globs, brace ranges ({000..099}) or tars, here or at s3://, gs://, https:// and hf://; there also a list
    of shards (.txt, one a line) or the manifest.json of `data pack`."""
    weight: NonNegativeFloat = 1.0
    """Share of the samples that come from here, relative to the other sources."""


class WeightChange(Config):
    """Other weights from some point of the run on."""

    from_sample: PositiveInt
    """Samples seen by all ranks before the change."""
    weights: dict[str, NonNegativeFloat]
    """Source -> weight; a source that is left out gets 0."""


class MixtureConfig(Config):
    """Sources and how they are interleaved."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Name -> shards and weight."""
    changes: tuple[WeightChange, ...] = ()
    """Weights that change in mid-run, in the order in which they come into force."""
    batches_by_length: PositiveInt = 1
    """So many neighbouring global batches exchange samples, so that each holds texts of like length (characters of the
    longest caption, from the indexes) and less of it is padding; a contrastive loss then tells apart texts of like
    length. 1: samples stand where they are drawn."""

    @property
    def weights(self) -> dict[str, float]:
        """The weights at the start."""
        return {name: source.weight for name, source in self.sources.items()}

    def broken_rules(self) -> Iterator[Rule]:
        if fault := _mixing_fault(self.weights):
            yield ("sources",), fault
        before = 0
        for number, change in enumerate(self.changes):
            path = ("changes", number)
            for name in change.weights.keys() - self.sources.keys():
                yield (*path, "weights", name), f"no source of this name; sources are {', '.join(self.sources)}"
            if fault := _mixing_fault(change.weights):
                yield (*path, "weights"), fault
            if change.from_sample <= before:
                yield (*path, "from_sample"), f"{change.from_sample} comes after {before}; sort the changes"
            before = change.from_sample


def _mixing_fault(weights: dict[str, float]) -> str | None:
    try:
        integer_shares(list(weights.values()))
    except ConfigError as error:
        return str(error)
    return None


class TokenizerConfig(Config):
    """Where the tokenizer comes from."""

    path: str | None = None
    """Local folder or hub name of a fast tokenizer; null: one is trained from the captions of the shards."""
    train_vocab_size: PositiveInt = 4096
    """Words of a tokenizer that is trained."""


_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)


class CacheConfig(Config):
    """Shards in object stores: what of them is kept on this node, and how it is fetched."""

    folder: Path | None = None
    """Local folder that all ranks of a node share; null: $MMPRETRAIN_CACHE, else mmpretrain in the user's own."""
    limit: str = "100GB"
    """What may lie there, e.g. 200GB or 1.5TB; what was read longest ago makes room."""
    part: Literal["chunk", "sample"] = "chunk"
    """What one request fetches. chunk: the 256 neighbouring samples that are drawn in one window, so that each node
    fetches every byte once an epoch; sample: one sample, so that all nodes together do, by more requests."""
    ahead: NonNegativeInt = 16_384
    """Samples, of all ranks, that are fetched before their step, rounded up to whole steps; 0: each is fetched when it
    is read."""
    downloads: PositiveInt = 8
    """Requests of one rank at the same time."""
    attempts: PositiveInt = 8
    """How often a request is made before the run stops; pauses double from a quarter of a second up to 30 s."""
    timeout_s: PositiveFloat = 60.0
    """Seconds of one request."""

    @property
    def limit_bytes(self) -> int:
        size = _SIZE.fullmatch(self.limit.strip())
        assert size is not None, self.limit
        return int(float(size[1]) * (1024 if size[3] else 1000) ** _UNITS[size[2].lower()])

    @property
    def place(self) -> Path:
        """The folder, wherever it is said."""
        if self.folder is not None:
            return self.folder.expanduser()
        if named := os.environ.get("MMPRETRAIN_CACHE"):
            return Path(named)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpretrain"

    def broken_rules(self) -> Iterator[Rule]:
        if not _SIZE.fullmatch(self.limit.strip()):
            yield ("limit",), f"{self.limit!r} is no size; write e.g. 200GB"


class DataConfig(Config):
    """What the run reads; the run config adds the codecs."""

    train: MixtureConfig
    """What the run trains on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    workers: NonNegativeInt = 1
    """Processes per rank that decode; 0: the training process decodes itself."""
    prefetch: PositiveInt = 2
    """Micro-batches each worker holds ready."""
    bad_sample_budget: float = Field(0.001, ge=0, le=1)
    """Share of the samples that may be unusable and replaced; past it the run stops and names the shards."""
    verify_checksums: bool = False
    """Compare every sample read with the checksum in the index; a sample that differs counts as unusable. What comes
    from an object store is always compared."""
    cache: CacheConfig = CacheConfig()
    """For shards in object stores."""
