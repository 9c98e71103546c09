"""Frozen features with labels: what probes are trained on and judged by.

Enter: a modality, training and test shards, a key of the .json member. Leave: this rank's unit vectors with the class
of each, and the accuracy of guesses: over all samples, and its mean over classes. Refused: shards without a sample of
the modality, and labels of a single class.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.core.collectives import all_reduce_sum, gather_objects
from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.base import EvaluationContext, Rows, TaskConfig
from mmpretrain.evaluation.labels import json_label

UNSEEN = -1
"""Class of test samples whose label no training sample has; no guess is right for them."""


@dataclass(frozen=True)
class Labelled:
    """Unit vectors fp32 [n, D] of this rank and their classes, int64 [n]."""

    vectors: Tensor
    classes: Tensor


class ProbeTaskConfig(TaskConfig):
    """A classifier over frozen features; subclasses add `kind` and say how it guesses."""

    modality: str = "image"
    """The tower whose features are probed."""
    label_key: str = "label"
    """Key of the samples' .json member; its value, a name or a number, is the class."""
    features: Literal["embedding", "pooled"] = "embedding"
    """embedding: what retrieval compares; pooled: what the tower gives before its projection, scaled to length 1."""
    train_shards: list[str] | None = None
    """Folders, globs or tars to learn from; null: the training shards. `shards` are those it is judged on."""
    train_samples: int | None = Field(None, gt=0)
    """Learn from so many samples over all ranks; null: all of them."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    @property
    def shard_sets(self) -> tuple[list[str] | None, ...]:
        return (self.train_shards, self.shards)

    @property
    @abstractmethod
    def figure(self) -> str:
        """Beginning of the figures' names."""

    @abstractmethod
    def guesses(self, train: Labelled, test: Tensor, num_classes: int) -> Tensor:
        """The class of each test vector of this rank, int64 [n]. Communicates."""

    def run(self, context: EvaluationContext) -> dict[str, float]:
        learned, learned_labels = self._features(context, self.train_shards, self.train_samples)
        asked, asked_labels = self._features(context, self.shards, self.max_samples)
        names = sorted(set().union(*gather_objects(set(learned_labels))))
        if len(names) < 2:
            raise DataError(
                f"a probe needs two classes to tell apart; the training samples have {names} under {self.label_key!r}"
            )
        train = Labelled(learned, _numbers(learned_labels, names, context.device))
        wanted = _numbers(asked_labels, names, context.device)
        guesses = self.guesses(train, asked, len(names))
        usual = all_reduce_sum(torch.bincount(train.classes, minlength=len(names))).argmax()
        figures = accuracies(guesses, wanted, len(names))
        figures["chance"] = accuracies(usual.expand_as(wanted), wanted, len(names))["top1"]
        return self.named({f"{self.figure}_{self.modality}_{name}": value for name, value in figures.items()})

    def _features(
        self, context: EvaluationContext, shards: list[str] | None, max_samples: int | None
    ) -> tuple[Tensor, list[str]]:
        """Vectors and labels of this rank's rows that hold the modality. Communicates."""
        vectors, labels = list[Tensor](), list[str]()
        for rows in context.turns_of(shards, max_samples):
            found = self._vectors(context, rows)
            present = [] if rows is None else rows.tensors[f"{self.modality}.present"].nonzero().flatten().tolist()
            vectors.append(found[present])
            labels += [json_label(rows.members[r], self.label_key, rows.keys[r]) for r in present if rows is not None]
        if not sum(gather_objects(len(labels))):
            raise DataError(
                f"a probe saw no samples that hold {self.modality!r}; check its "
                f"{'train_shards' if shards is self.train_shards else 'shards'}"
            )
        return torch.cat(vectors), labels

    def _vectors(self, context: EvaluationContext, rows: Rows | None) -> Tensor:
        fields = context.stand_in(self.modality) if rows is None else rows.tensors
        if self.features == "embedding":
            return context.embed(self.modality, fields)
        return F.normalize(context.pooled(self.modality, fields), dim=-1)


def accuracies(guesses: Tensor, classes: Tensor, num_classes: int) -> dict[str, float]:
    """{"top1", "mean_class"}: the share of right guesses over all ranks, and its mean over the classes that occur, all
    unseen ones as one. Communicates."""
    places = torch.where(classes == UNSEEN, num_classes, classes)
    right = torch.bincount(places[guesses == classes], minlength=num_classes + 1)
    hits, counts = all_reduce_sum(torch.stack([right, torch.bincount(places, minlength=num_classes + 1)])).double()
    occurs = counts > 0
    return {"top1": float(hits.sum() / counts.sum()), "mean_class": float((hits[occurs] / counts[occurs]).mean())}


def _numbers(labels: list[str], names: list[str], device: torch.device) -> Tensor:
    index = {name: number for number, name in enumerate(names)}
    return torch.tensor([index.get(label, UNSEEN) for label in labels], dtype=torch.int64, device=device)
