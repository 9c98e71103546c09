"""What a publication tells of the run behind it: recorded facts alone, nothing that nobody measured.

Enter: the resolved run config, counts, data sources and figures. Leave: an immutable record for card and provenance.
Refused: a missing name or license, and text that still holds a placeholder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmpretrain.core.errors import MMPretrainError

Json = Mapping[str, object]

PLACEHOLDER = re.compile(
    r"\{[a-z_]*\}|\[(more information needed|[a-z ]*here)\]|<(your|insert)[^>]*>|\b(TODO|TBD|FIXME|XXX)\b",
    re.IGNORECASE,
)


class PublishError(MMPretrainError):
    """The model cannot be published as asked; nothing was left at the target."""


@dataclass(frozen=True)
class SourceFacts:
    """One data source of the run."""

    name: str
    num_shards: int
    num_samples: int
    digest: str
    """A hash over the shards' names, sizes or checksums, so that the same data can be told again."""
    license: str | None = None


@dataclass(frozen=True)
class ParentFacts:
    """The model whose weights a fine-tuning run began with."""

    source: str
    """Folder or hub name, as the run was given it."""
    description: str
    """What stood there, e.g. "CLIPModel"."""
    digest: str
    """A hash over its weights."""


@dataclass(frozen=True)
class PublishFacts:
    """Everything a card says beyond what the model's own config says."""

    name: str
    """Name of the model, as a reader should call it."""
    license: str
    """License identifier as the Hugging Face Hub knows it ("apache-2.0", "cc-by-4.0", "other", ...)."""
    steps: int
    samples_seen: int
    run_config: Json
    """The resolved run config: objectives, optimizer, batch sizes and all else."""
    sources: tuple[SourceFacts, ...] = ()
    parent: ParentFacts | None = None
    """What it was fine-tuned from; None: it was trained from scratch."""
    evaluations: Mapping[str, float] | None = None
    """The last figures recorded in the run, by metric name; None: the run never evaluated."""
    evaluated_at_step: int | None = None
    average_decay: float | None = None
    """The weights are the moving average of those of the run, with this decay; None: they are the last ones."""
    hardware: str | None = None
    """The machines of the run in words, e.g. "2 x H100, 1 node"."""
    commit: str | None = None
    """Commit of the code that trained."""
    run_url: str | None = None
    """Where the run's curves can be seen."""
    description: str | None = None
    """A paragraph of the user's own."""
    limitations: str | None = None
    """What the user knows the model cannot do; stands before what follows from the record."""


def check_facts(facts: PublishFacts) -> None:
    """Raise PublishError when a fact that a reader needs is absent or unfilled."""
    if not facts.license.strip():
        raise PublishError("no license was given; name one the Hub knows, e.g. --license apache-2.0")
    if not facts.name.strip():
        raise PublishError("the model has no name; give one with --name")
    for field in ("name", "license", "description", "limitations", "hardware"):
        refuse_placeholders(getattr(facts, field) or "", f"the {field}")


def refuse_placeholders(text: str, where: str) -> None:
    """Raise PublishError when the text holds something that was meant to be filled in."""
    found = PLACEHOLDER.search(text)
    if found:
        raise PublishError(f"{where} still holds the placeholder {found.group()!r}; fill it in before publishing")
