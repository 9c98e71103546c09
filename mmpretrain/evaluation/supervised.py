"""How well an objective's head tells labels of samples it was not trained on.

Enter: labelled shards, the name of a supervised objective. Leave: share of right classes or tags, or the mean absolute
error, over all samples with a label. Refused: an objective that is not there or not supervised.
"""

from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.objectives.supervised import Supervised


class SupervisedTaskConfig(TaskConfig):
    """Accuracy, or mean absolute error, of a supervised objective."""

    kind: Literal["supervised"] = "supervised"
    objective: str
    """Name of the objective in the run's objectives."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ()

    def run(self, context: EvaluationContext) -> dict[str, float]:
        """`<label>_acc` or `<label>_mae`, and how many samples it is taken over."""
        objective = _find(context, self.objective)
        total = torch.zeros(2, dtype=torch.float64, device=context.device)
        for rows in context.turns(self):
            fields = _stand_in(context, objective) if rows is None else rows.tensors
            fields = {name: tensor.to(context.device) for name, tensor in fields.items()}
            with torch.no_grad(), context.autocast():
                parts = objective.encode(context.model.encoder(fields))
            if rows is not None:
                total += torch.stack([parts["figure"].sum(), parts["count"].sum()]).double()
        figure, count = all_reduce_sum(total).tolist()
        name = f"{objective.label}_{'mae' if objective.target == 'values' else 'acc'}"
        return self.named({name: figure / max(count, 1.0), f"{objective.label}_count": count})


def _find(context: EvaluationContext, name: str) -> Supervised:
    objectives = context.model.objectives
    known = [each for each, objective in objectives.items() if isinstance(objective, Supervised)]
    if name not in known:
        raise ConfigError(
            f"an evaluation task measures the objective {name!r}, and the run's supervised ones are "
            f"{', '.join(known) or 'none'}; name one of them"
        )
    objective = objectives[name]
    assert isinstance(objective, Supervised)
    return objective


def _stand_in(context: EvaluationContext, objective: Supervised) -> TensorDict:
    """One row of everything the objective reads."""
    fields: dict[str, Tensor] = {}
    for name in (*objective.inputs, objective.label):
        fields |= {f"{name}.present": torch.ones(1, dtype=torch.bool)} | context.stand_in(name)
    return fields
