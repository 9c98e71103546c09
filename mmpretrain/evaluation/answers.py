"""How often supervised objectives are right, and how often without each of the modalities they are told from.

Enter: labelled samples. Leave, for each supervised objective, what it is measured by in training ("answer_acc", for
values the mean error "answer_mae"), the same rows with each of several inputs taken away ("answer_acc_no_audio": where
it stays as high, that input is not used), and, for single classes, how often the most frequent class is right
("answer_acc_guess"). Refused: a model without such an objective, samples without a label.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import DataError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.ablation import AblatedEncoder
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.objectives.base import Encoder, ObjectiveConfig
from mmpretrain.objectives.supervised import Supervised, SupervisedConfig


class AnswersConfig(TaskConfig):
    """Accuracy of the supervised objectives, whole and with each input absent in turn."""

    kind: Literal["answers"] = "answers"

    @property
    def modalities(self) -> tuple[str, ...]:
        return ()

    def faults(self, towers: Collection[str], objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
        if not any(isinstance(objective, SupervisedConfig) for objective in objectives.values()):
            yield f"needs a supervised objective, the run has {', '.join(objectives)}; add one or remove the task"

    def figure_groups(self, towers: Collection[str]) -> frozenset[str]:
        return frozenset({"answers"})

    def run(self, context: EvaluationContext) -> dict[str, float]:
        found = {name: each for name, each in context.model.objectives.items() if isinstance(each, Supervised)}
        measures = {name: _Measure(objective, context) for name, objective in found.items()}
        for rows in context.turns(self):
            batch = context.batch(rows)
            for measure in measures.values():
                measure.add(batch)
        figures: dict[str, float] = {}
        for name, measure in measures.items():
            figures |= measure.figures(name)
        return self.named(figures)


class _Measure:
    """Sums of one objective over this rank's rows."""

    def __init__(self, objective: Supervised, context: EvaluationContext) -> None:
        self.objective, self.context = objective, context
        self.sums = torch.zeros(1 + len(objective.conditions), 2, dtype=torch.float64, device=context.device)
        classes = objective.head.predict.out_features if objective.target == "class" else 0
        self.labels = torch.zeros(classes, dtype=torch.float64, device=context.device)
        """How often each class is right."""

    def add(self, batch: TensorDict) -> None:
        model, label = self.context.model, self.objective.label
        without = [AblatedEncoder(model, batch, [modality]) for modality in self.objective.conditions]
        encoders: list[Encoder] = [model.encoder(batch), *without]
        for sums, encoder in zip(self.sums, encoders, strict=True):
            with torch.no_grad(), self.context.autocast():
                parts = self.objective.encode(encoder)
            sums += torch.cat([parts["figure"], parts["count"]]).double()
        if len(self.labels):
            known = batch[label][batch[f"{label}.present"]]
            self.labels += torch.bincount(known, minlength=len(self.labels)).double()

    def figures(self, name: str) -> dict[str, float]:
        """Communicates."""
        sums, labels = all_reduce_sum(self.sums), all_reduce_sum(self.labels)
        if not sums[0, 1]:
            raise DataError(f"the evaluation of {name} found no labels {self.objective.label!r}; check its shards")
        measure = f"{name}_{'mae' if self.objective.target == 'values' else 'acc'}"
        names = [measure, *(f"{measure}_no_{modality}" for modality in self.objective.conditions)]
        rates: Tensor = sums[:, 0] / sums[:, 1]
        guess = {f"{measure}_guess": float(labels.max() / labels.sum())} if len(labels) else {}
        return dict(zip(names, rates.tolist(), strict=True)) | guess
