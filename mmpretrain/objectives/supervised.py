"""Supervised learning: one class, any number of tags, or values, from a pooled vector.

Enter: rows of which some have a label, a batch field that a label codec makes. Leaves: cross-entropy, binary
cross-entropy or squared error (a mean over the outputs of a row), summed over the rows that have a label and at least
one of the modalities; all others weigh nothing, so that partly labelled data trains semi-supervised beside other
objectives. Refuses smoothing where there is no single class. Legend: B rows, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import reduce
from operator import or_
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.layers.output_head import OutputHead
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective, ObjectiveConfig

Target = Literal["class", "tags", "values"]


class Supervised(Objective):
    """Predict a label."""

    def __init__(self, config: SupervisedConfig, width: int) -> None:
        super().__init__()
        self.label, self.target, self.inputs = config.label, config.target, config.inputs
        self.smoothing = config.smoothing
        self.head = OutputHead(width, config.outputs)

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.inputs if len(self.inputs) > 1 else ()

    def count(self, batch: TensorDict) -> Tensor:
        return self._labelled(batch).sum(dtype=torch.float32)

    def encode(self, encoder: Encoder) -> TensorDict:
        labelled, labels = self._labelled(encoder.batch), encoder.batch[self.label]
        outputs = self.predict(encoder)
        losses = self._losses(outputs, labels).masked_fill(~labelled, 0.0)
        right = self._figure(outputs.detach(), labels).masked_fill(~labelled, 0.0)
        return {"sum": losses.sum().view(1), "figure": right.sum().view(1), "count": labelled.sum().view(1)}

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Share of right classes or tags, or the mean absolute error, over the global batch; communicates."""
        figure, count = all_reduce_sum(torch.stack([parts["figure"].sum(), parts["count"].sum()]))
        return {f"{self.label}_{'mae' if self.target == 'values' else 'acc'}": figure / count.clamp(min=1)}

    def predict(self, encoder: Encoder) -> Tensor:
        """Logits or values, [B, C]."""
        towers = {modality: encoder.tower(modality) for modality in self.inputs}
        pooled = towers[self.inputs[0]]["pooled"] if len(towers) == 1 else encoder.fuse(towers)["pooled"]
        outputs: Tensor = self.head(pooled)
        return outputs

    def _labelled(self, batch: TensorDict) -> Tensor:
        """bool [B]: rows with the label and something to tell it from."""
        return batch[f"{self.label}.present"] & reduce(or_, (batch[f"{m}.present"] for m in self.inputs))

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.target == "class":
            return functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=self.smoothing)
        wanted = labels.to(outputs.dtype)
        if self.target == "tags":
            return functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1)
        return (outputs - wanted).square().mean(1)

    def _figure(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.target == "class":
            return (outputs.argmax(1) == labels).to(outputs.dtype)
        if self.target == "tags":
            return ((outputs > 0) == labels).to(outputs.dtype).mean(1)
        return (outputs - labels).abs().mean(1)


class SupervisedConfig(ObjectiveConfig):
    """Classification, tagging or regression."""

    kind: Literal["supervised"] = "supervised"
    inputs: tuple[str, ...] = Field(default=("image",), min_length=1)
    """What the label is told from: one modality by its tower's pooled vector, several by the fusion over them."""
    label: str = Field(default="label", min_length=1)
    """Batch field of the label; data.codecs needs a codec of this name and of kind label."""
    target: Target = "class"
    """class: one of `outputs`; tags: any number of them; values: `outputs` real numbers."""
    outputs: int = Field(gt=0)
    """Classes, tags or values."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (target class), e.g. 0.1."""

    @model_validator(mode="after")
    def _settings_fit(self) -> SupervisedConfig:
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs {list(self.inputs)} names a modality twice; name each once")
        if self.smoothing and self.target != "class":
            raise ValueError(f"smoothing {self.smoothing} is for target class, this is {self.target}; set it to 0")
        if self.target == "class" and self.outputs < 2:
            raise ValueError("one class leaves nothing to tell apart; set outputs to 2 or more, or target to tags")
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.inputs

    @property
    def needs_pooled(self) -> bool:
        return len(self.inputs) > 1

    @property
    def input_fields(self) -> Mapping[str, FieldSpec]:
        if self.target == "class":
            return {self.label: FieldSpec((), "int64", below=self.outputs)}
        return {self.label: FieldSpec((self.outputs,), "bool" if self.target == "tags" else "float32")}

    def counts_with(self, held: Set[str]) -> bool:
        return self.label in held and not held.isdisjoint(self.inputs)

    def build(self, facts: ModelFacts) -> Supervised:
        width = facts.fusion_width if self.needs_pooled else facts.towers[self.inputs[0]].width
        assert width is not None, "the model config refuses an objective whose fused vector is not there"
        return Supervised(self, width)
