"""Whether the samples of a run can teach what the run is to learn, told before the first step.

Enter: the config and the opened sources. Leave: nothing. Refused: an objective that no sample serves, and a source
whose samples serve no objective. Noted: micro-batches that hold unequal numbers of rows of each source.
"""

import logging
from collections.abc import Collection, Mapping, Sequence

from data_pipeline.loader import Loader
from data_pipeline.reader import Source
from mmpretrain.config import RunConfig
from mmpretrain.core.errors import DataError
from mmpretrain.objectives.base import ObjectiveConfig, expand_all

log = logging.getLogger(__name__)


def check_sources(config: RunConfig, loader: Loader) -> None:
    """Refuse what would be trained on in vain."""
    drawn = [source for source in loader.sources if _is_drawn(config, source.name)]
    objectives = expand_all(config.objectives, config.model.towers)
    _check_objectives(objectives, drawn)
    for source in drawn:
        _check_source(objectives, source)
    slots = loader.uneven_slots
    if slots is not None and len({source.together for source in drawn}) > 1:
        log.info(
            "micro_batch_size %d is no multiple of the mixture's %d slots, so micro-batches differ by a row in what "
            "they hold of each source; losses and shapes do not depend on it, and a multiple of %d would even it out",
            config.micro_batch_size,
            slots,
            slots,
        )


def _is_drawn(config: RunConfig, name: str) -> bool:
    train = config.data.train
    return bool(train.weights[name] or any(change.weights.get(name) for change in train.changes))


def _check_objectives(objectives: Mapping[str, ObjectiveConfig], sources: Sequence[Source]) -> None:
    kinds = frozenset[frozenset[str]]().union(*(source.together for source in sources))
    for name, objective in objectives.items():
        if not any(objective.counts_with(held) for held in kinds):
            raise DataError(
                f"no sample holds what objective {name} reads together ({_named(objective.reads)}); samples hold "
                f"{_listed(kinds)}; add shards whose samples do, or remove the objective"
            )


def _check_source(objectives: Mapping[str, ObjectiveConfig], source: Source) -> None:
    if any(objective.counts_with(held) for objective in objectives.values() for held in source.together):
        return
    needs = "; ".join(f"{name}: {_named(objective.reads)}" for name, objective in objectives.items())
    raise DataError(
        f"source {source.name} teaches nothing: its samples hold {_listed(source.together)}, and no objective counts "
        f"such samples ({needs}); remove the source, or add an objective that reads what it holds"
    )


def _listed(kinds: Collection[frozenset[str]]) -> str:
    """The kinds of samples in words, the fullest first."""
    ordered = sorted(kinds, key=lambda held: (-len(held), sorted(held)))
    return ", or ".join(_named(sorted(held)) for held in ordered)


def _named(held: Collection[str]) -> str:
    return " + ".join(held) or "none of these"
