"""What tasks over pairs of modalities share: which pairs they are about.

Enter: one pair, several, or "all". Leave: the pairs of a model. Refused: a modality beside itself, a pair named twice,
`pair` together with `pairs`, and "all" where a model has one tower.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmpretrain.evaluation.base import TaskConfig
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.pairs import PairOfModalities

Pair = tuple[str, str]
_USUAL: Pair = ("image", "text")


class PairsTaskConfig(TaskConfig):
    """A task over pairs of modalities; subclasses add `kind`."""

    pair: PairOfModalities | None = None
    """The two modalities; left out, as `pairs` is: image and text."""
    pairs: Literal["all"] | Annotated[list[PairOfModalities], Field(min_length=1)] | None = None
    """Several pairs instead, or all: every two towers of the model that some sample holds together."""

    @model_validator(mode="after")
    def _pairs_differ(self) -> "PairsTaskConfig":
        if self.pair is not None and self.pairs is not None:
            raise ValueError("both pair and pairs are given; put all of them into pairs")
        named = [frozenset(pair) for pair in self._named()]
        if len(set(named)) < len(named):
            raise ValueError(f"pairs {self.pairs} names a pair twice; name each once, in either order")
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(modality for pair in self._named() for modality in pair))

    def faults(self, towers: Collection[str], objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
        if self.pairs == "all" and len(towers) < 2:
            yield f"compares modalities, the model has {', '.join(towers)} alone; remove the task or add a tower"

    def figure_groups(self, towers: Collection[str]) -> frozenset[str]:
        return frozenset(" and ".join(sorted(pair)) for pair in self.chosen(towers))

    def chosen(self, towers: Collection[str]) -> list[Pair]:
        """The pairs of a model with these towers."""
        return list(combinations(sorted(towers), 2)) if self.pairs == "all" else self._named()

    def _named(self) -> list[Pair]:
        """Pairs that the config names, none for "all"."""
        if self.pairs is None:
            return [self.pair or _USUAL]
        return [] if self.pairs == "all" else list(self.pairs)
