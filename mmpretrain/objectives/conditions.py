"""What masked objectives share: something of one modality is hidden, others may be in sight through the fusion.

Enter: a batch, or a chunk's encoder and a tower's output. Leave: which rows count, and tokens that know of the others.
Refuses a modality that is to be in sight twice, or is the hidden one. Legend: B rows, L tokens, D width.
"""

from __future__ import annotations

from functools import reduce
from operator import and_

from pydantic import model_validator
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.objectives.base import Encoder, ObjectiveConfig


class ConditionedConfig(ObjectiveConfig):
    """Config of an objective that hides something of one modality."""

    modality: str
    """The modality of which something is hidden."""
    condition_on: tuple[str, ...] = ()
    """Modalities in sight through the fusion while predicting, e.g. [image]; empty: what is left of its own alone."""

    @model_validator(mode="after")
    def _conditions_differ(self) -> ConditionedConfig:
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(
                f"condition_on {list(self.condition_on)} names a modality twice or {self.modality!r} itself; "
                "name each other modality once"
            )
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality, *self.condition_on)

    @property
    def needs_fusion(self) -> bool:
        return bool(self.condition_on)


def rows_with(batch: TensorDict, modalities: tuple[str, ...]) -> Tensor:
    """bool [B]: rows that have all these modalities."""
    return reduce(and_, (batch[f"{modality}.present"] for modality in modalities))


def tokens_in_sight(encoder: Encoder, modality: str, output: TensorDict, condition_on: tuple[str, ...]) -> Tensor:
    """The tokens of a tower's output [B, L, D], fused with those of the other modalities if there are any."""
    if not condition_on:
        return output["tokens"]
    others = {other: encoder.tower(other) for other in condition_on}
    return encoder.fuse({modality: output, **others})[modality]
