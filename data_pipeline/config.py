"""What a run reads and how: sources and their weights, the tokenizer, worker processes, the budget of bad samples.

Enter: the `data:` part of a run config. Leave: `DataConfig`, without the codecs, which the run config adds. Refuses
weights that cannot be mixed exactly and changes of weights that are out of order.
"""

from collections.abc import Iterator

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from data_pipeline.mixture import integer_shares
from mmpretrain.core.config import Config, Rule
from mmpretrain.core.errors import ConfigError


class SourceConfig(Config):
    """One set of shards."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders, globs, brace ranges ({000..099}) or tars."""
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
    """Compare every sample read with the checksum in the index; a sample that differs counts as unusable."""
