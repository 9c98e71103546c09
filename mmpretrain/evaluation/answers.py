"""How often supervised objectives are right, and how often without each of the modalities they are told from.

Enter: labelled samples. Leave, for each supervised objective, what it is measured by in training (`_acc`, for values
the mean error `_mae`), the same with each of several inputs taken away (`_acc_no_<input>`: where it stays as high, that
input is not used), and, for single classes, how often the most frequent class is right (`_acc_guess`). Refused: a model
without such an objective, samples without a label.
"""

from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.ablation import AblatedEncoder
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.objectives.base import Encoder
from mmpretrain.objectives.supervised import Supervised


class AnswersConfig(TaskConfig):
    """Accuracy of the supervised objectives, whole and with each input absent in turn."""

    kind: Literal["answers"] = "answers"
    ablate: bool = True
    """Also measure without each input of an objective that has several; as many more runs of the model as it has."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ()

    def run(self, context: EvaluationContext) -> dict[str, float]:
        objectives = _objectives(context)
        measures = {name: _Measure(objective, self.ablate, context) for name, objective in objectives.items()}
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

    def __init__(self, objective: Supervised, ablate: bool, context: EvaluationContext) -> None:
        self.objective, self.context = objective, context
        inputs = objective.inputs if ablate and len(objective.inputs) > 1 else ()
        self.absences: list[tuple[str, ...]] = [(), *((name,) for name in inputs)]
        self.sums = torch.zeros(len(self.absences), 2, dtype=torch.float64, device=context.device)
        classes = objective.head.predict.out_features if objective.target == "class" else 0
        self.labels = torch.zeros(classes, dtype=torch.float64, device=context.device)

    def add(self, batch: TensorDict) -> None:
        model = self.context.model
        for number, absent in enumerate(self.absences):
            encoder: Encoder = AblatedEncoder(model, batch, absent) if absent else model.encoder(batch)
            with torch.no_grad(), self.context.autocast():
                parts = self.objective.encode(encoder)
            self.sums[number] += torch.cat([parts["figure"], parts["count"]]).double()
        if len(self.labels):
            known = batch[self.objective.label][batch[f"{self.objective.label}.present"]]
            self.labels += torch.bincount(known, minlength=len(self.labels)).double()

    def figures(self, name: str) -> dict[str, float]:
        """Communicates."""
        sums, labels = all_reduce_sum(self.sums), all_reduce_sum(self.labels)
        if not sums[0, 1]:
            raise DataError(f"the evaluation of {name} found no labels {self.objective.label!r}; check its shards")
        measure = f"{name}_{'mae' if self.objective.target == 'values' else 'acc'}"
        rates: Tensor = sums[:, 0] / sums[:, 1]
        names = [measure, *(f"{measure}_no_{absent}" for (absent,) in self.absences[1:])]
        found = dict(zip(names, rates.tolist(), strict=True))
        return found | ({f"{measure}_guess": float(labels.max() / labels.sum())} if len(labels) else {})


def _objectives(context: EvaluationContext) -> dict[str, Supervised]:
    found = {name: each for name, each in context.model.objectives.items() if isinstance(each, Supervised)}
    if not found:
        raise ConfigError(
            f"the evaluation of kind answers needs a supervised objective; the model has "
            f"{sorted(context.model.objectives)}; remove the evaluation or add the objective"
        )
    return found
