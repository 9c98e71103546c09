"""How many hidden words a model finds, and how many of them thanks to the image.

Enter: samples with text. Leave: for each masked-language objective its accuracy, for one that is conditioned on other
modalities also the accuracy with those of another sample (`_acc_shuffled`: what the text alone gives away, with inputs
as in training), and the accuracy of always guessing the most frequent word (`_acc_guess`). What is hidden follows from
the sample's key, so it is the same at every step, on any number of ranks. Refused: a model without such an objective.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.objectives.mlm import MaskedLanguageModelling


class MLMTaskConfig(TaskConfig):
    """Accuracy of the masked-language objectives."""

    kind: Literal["mlm"] = "mlm"
    modality: str = "text"
    """The text modality whose objectives are evaluated."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    def run(self, context: EvaluationContext) -> dict[str, float]:
        objectives = _objectives(context, self.modality)
        facts = context.model.facts.towers[self.modality]
        words = torch.zeros(facts.vocab_size or 0, dtype=torch.float64, device=context.device)
        hits = {name: torch.zeros(3, dtype=torch.float64, device=context.device) for name in objectives}
        others = _Others({m for objective in objectives.values() for m in objective.condition_on})
        for rows in context.turns(self):
            batch = context.batch(rows)
            for name, found in _accuracies(context, objectives, batch, others.swap(batch)).items():
                hits[name] += found
            words += _frequencies(batch, self.modality, facts.special_ids, len(words))
        return self.named(_figures(objectives, hits, words))


class _Others:
    """Gives each row the inputs of the row before it, over batches too, so that none keeps its own."""

    def __init__(self, modalities: Iterable[str]) -> None:
        self.modalities = sorted(modalities)
        self._last: TensorDict = {}

    def swap(self, batch: TensorDict) -> TensorDict:
        """The batch with other inputs in every row that has the modality."""
        swapped = dict(batch)
        for modality in self.modalities:
            present = batch[f"{modality}.present"].nonzero().flatten()
            if len(present):
                own = batch[modality][present]
                before = self._last.get(modality, own[-1:])
                inputs = batch[modality].clone()
                inputs[present] = torch.cat([before, own[:-1]])
                swapped[modality], self._last[modality] = inputs, own[-1:]
        return swapped


def _objectives(context: EvaluationContext, modality: str) -> dict[str, MaskedLanguageModelling]:
    found = {
        name: objective
        for name, objective in context.model.objectives.items()
        if isinstance(objective, MaskedLanguageModelling) and objective.modality == modality
    }
    if not found:
        raise ConfigError(
            f"the evaluation of kind mlm needs an mlm objective on {modality!r}; the model has "
            f"{sorted(context.model.objectives)}; remove the evaluation or add the objective"
        )
    return found


def _accuracies(
    context: EvaluationContext,
    objectives: dict[str, MaskedLanguageModelling],
    batch: TensorDict,
    swapped: TensorDict,
) -> dict[str, Tensor]:
    """Per objective [right, right with another sample's modalities, hidden], float64 [3]."""
    with torch.no_grad(), context.autocast():
        own, other = context.model.encoder(batch), context.model.encoder(swapped)
        parts = {name: (objective.encode(own), objective.encode(other)) for name, objective in objectives.items()}
    return {
        name: torch.cat([with_own["correct"], with_other["correct"], with_own["count"]]).double()
        for name, (with_own, with_other) in parts.items()
    }


def _frequencies(batch: TensorDict, modality: str, special_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    ids = batch[modality][batch[f"{modality}.mask"] & batch[f"{modality}.present"][:, None]]
    ordinary = ids[~torch.isin(ids, torch.tensor(special_ids, dtype=torch.int64, device=ids.device))]
    return torch.bincount(ordinary, minlength=vocab_size).double()


def _figures(
    objectives: dict[str, MaskedLanguageModelling], hits: dict[str, Tensor], words: Tensor
) -> dict[str, float]:
    figures: dict[str, float] = {}
    counted = all_reduce_sum(words)
    for name, objective in objectives.items():
        right, right_other, hidden = all_reduce_sum(hits[name]).tolist()
        if not hidden:
            raise DataError(f"the evaluation of {name} found no words to hide; check its shards and their captions")
        figures[f"{name}_acc"] = right / hidden
        if objective.condition_on:
            figures[f"{name}_acc_shuffled"] = right_other / hidden
        figures[f"{name}_acc_guess"] = float(counted.max() / counted.sum())
    return figures
