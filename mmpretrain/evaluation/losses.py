"""Losses of objectives on samples held out, whole and without each modality that they look at.

Enter: samples. Leave: for each objective its mean loss over the targets ("loss_mim"), and for each modality that it is
conditioned on the same targets' loss with that modality taken away ("loss_mim_no_text"): the rise is what the
modality is worth. What is masked follows from the sample's key, so it is the same at every step, on any number of
ranks. Refused: objectives whose loss compares the rows of a batch, for it depends on which rows those are.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.evaluation.ablation import AblatedEncoder
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.evaluation.rebuilt import show_rebuilt
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import Encoder, Objective, ObjectiveConfig


class LossesTaskConfig(TaskConfig):
    """Mean losses of objectives."""

    kind: Literal["losses"] = "losses"
    objectives: list[str] | None = None
    """Names of objectives; null: all but those that compare the rows of a batch."""
    samples: NonNegativeInt = 8
    """Samples of which is written out what each objective that predicts patches makes of them; 0: none."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ()

    def faults(self, towers: Collection[str], objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
        for name in self.objectives or ():
            if name not in objectives:
                yield f"names the objective {name}, the run has {', '.join(objectives)}; name one of those"

    def figure_groups(self, towers: Collection[str]) -> frozenset[str]:
        return frozenset({"losses"})

    def run(self, context: EvaluationContext) -> dict[str, float]:
        objectives = self._chosen(context.model)
        conditions = {name: objective.conditions for name, objective in objectives.items()}
        totals = {
            name: torch.zeros(len(conditions[name]) + 2, dtype=torch.float64, device=context.device)
            for name in objectives
        }
        taken = sorted({modality for each in conditions.values() for modality in each})
        for turn, rows in enumerate(context.turns(self)):
            batch = context.batch(rows)
            whole: Encoder = context.model.encoder(batch)
            if turn == 0 and self.samples:
                show_rebuilt(context, self.prefix, objectives, whole, () if rows is None else rows.keys[: self.samples])
            without = {modality: AblatedEncoder(context.model, batch, [modality]) for modality in taken}
            for name, objective in objectives.items():
                encoders = [whole, *(without[modality] for modality in conditions[name])]
                with torch.no_grad(), context.autocast():
                    sums = [objective.encode(encoder)["sum"].double() for encoder in encoders]
                totals[name] += torch.cat([*sums, objective.count(batch).double().view(1)])
        return self.named(_figures(conditions, totals))

    def check_model(self, model: MultimodalTransformer) -> None:
        self._chosen(model)

    def _chosen(self, model: MultimodalTransformer) -> dict[str, Objective]:
        known = dict(model.objectives_by_name())
        independent = [name for name, objective in known.items() if not objective.spans_batch]
        wanted = independent if self.objectives is None else self.objectives
        if spanning := sorted(set(wanted) - set(independent)):
            raise ConfigError(
                f"an evaluation of kind losses names {', '.join(spanning)}, whose loss compares the rows of a batch "
                "and so depends on its size; remove it there and evaluate it by retrieval"
            )
        if not wanted:
            raise ConfigError(
                f"an evaluation of kind losses has nothing to do: each objective of the model ({', '.join(known)}) "
                "compares the rows of a batch; remove the evaluation"
            )
        return {name: known[name] for name in wanted}


def _figures(conditions: Mapping[str, tuple[str, ...]], totals: Mapping[str, Tensor]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, taken in conditions.items():
        *sums, count = all_reduce_sum(totals[name]).tolist()
        if not count:
            raise DataError(f"the evaluation of {name} found nothing to predict; check the shards of its task")
        endings = ("", *(f"_no_{modality}" for modality in taken))
        figures |= {f"loss_{name}{ending}": total / count for ending, total in zip(endings, sums, strict=True)}
    return figures
