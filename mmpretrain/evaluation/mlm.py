"""How many hidden words a model finds, and how many of them thanks to each modality in sight.

Enter: samples with text. Leave: for each masked-language objective its accuracy; for one that is conditioned on other
modalities also the accuracy with those of another sample (`_acc_shuffled`: what the text alone gives away, with inputs
as in training; of several each on its own, `_acc_shuffled_<modality>`), without each modality in turn
(`_acc_no_<modality>`), and of always guessing the most frequent word (`_acc_guess`). What is hidden follows from
the sample's key, so it is the same at every step, on any number of ranks. Refused: a model without such an objective.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import DataError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.ablation import AblatedEncoder
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.objectives.base import Encoder, ObjectiveConfig
from mmpretrain.objectives.mlm import MaskedLanguageModelling, MLMConfig


class MLMTaskConfig(TaskConfig):
    """Accuracy of the masked-language objectives."""

    kind: Literal["mlm"] = "mlm"
    modality: str = "text"
    """The text modality whose objectives are evaluated."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    def faults(self, towers: Collection[str], objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
        if not any(isinstance(each, MLMConfig) and each.modality == self.modality for each in objectives.values()):
            yield (
                f"needs an mlm objective on {self.modality}, the model has the objectives {', '.join(objectives)}; "
                "remove the task or add one"
            )

    def run(self, context: EvaluationContext) -> dict[str, float]:
        objectives = {
            name: objective
            for name, objective in context.model.objectives.items()
            if isinstance(objective, MaskedLanguageModelling) and objective.modality == self.modality
        }
        facts = context.model.facts.towers[self.modality]
        words = torch.zeros(facts.vocab_size or 0, dtype=torch.float64, device=context.device)
        views = {name: _views(objective.condition_on) for name, objective in objectives.items()}
        hits = {
            name: torch.zeros(len(own) + 1, dtype=torch.float64, device=context.device) for name, own in views.items()
        }
        others = _Others({m for objective in objectives.values() for m in objective.condition_on})
        for rows in context.turns(self):
            batch = context.batch(rows)
            encoders = _encoders(context, batch, others.swap(batch), others.modalities)
            for name, objective in objectives.items():
                with torch.no_grad(), context.autocast():
                    parts = [objective.encode(encoders[view]) for view in views[name]]
                hits[name] += torch.cat([*(part["correct"] for part in parts), parts[0]["count"]]).double()
            words += _frequencies(batch, self.modality, facts.special_ids, len(words))
        return self.named(_figures(views, hits, words))


def _views(conditions: tuple[str, ...]) -> list[str]:
    """Endings of the figures, each a way to look at a batch."""
    if not conditions:
        return [""]
    alone = [f"_shuffled_{modality}" for modality in conditions] if len(conditions) > 1 else []
    return ["", "_shuffled", *alone, *(f"_no_{modality}" for modality in conditions)]


def _encoders(
    context: EvaluationContext, batch: TensorDict, swapped: TensorDict, modalities: list[str]
) -> dict[str, Encoder]:
    """The model over the batch in each view of an objective that is conditioned on some of these modalities."""
    encoder = context.model.encoder
    views = {"": encoder(batch), "_shuffled": encoder(swapped)}
    for modality in modalities:
        alone = {name: swapped[name] if _is_input(name, modality) else value for name, value in batch.items()}
        views[f"_shuffled_{modality}"] = encoder(alone)
        views[f"_no_{modality}"] = AblatedEncoder(context.model, batch, [modality])
    return views


def _is_input(name: str, modality: str) -> bool:
    return name in (modality, f"{modality}.mask")


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
            for name in (name for name in batch if _is_input(name, modality) and len(present)):
                own = batch[name][present]
                before = self._last.get(name, own[-1:])
                inputs = batch[name].clone()
                inputs[present] = torch.cat([before, own[:-1]])
                swapped[name], self._last[name] = inputs, own[-1:]
        return swapped


def _frequencies(batch: TensorDict, modality: str, special_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    ids = batch[modality][batch[f"{modality}.mask"] & batch[f"{modality}.present"][:, None]]
    ordinary = ids[~torch.isin(ids, torch.tensor(special_ids, dtype=torch.int64, device=ids.device))]
    return torch.bincount(ordinary, minlength=vocab_size).double()


def _figures(views: dict[str, list[str]], hits: dict[str, Tensor], words: Tensor) -> dict[str, float]:
    figures: dict[str, float] = {}
    counted = all_reduce_sum(words)
    for name, own in views.items():
        *right, hidden = all_reduce_sum(hits[name]).tolist()
        if not hidden:
            raise DataError(f"the evaluation of {name} found no words to hide; check its shards and their captions")
        figures |= {f"{name}_acc{view}": found / hidden for view, found in zip(own, right, strict=True)}
        figures[f"{name}_acc_guess"] = float(counted.max() / counted.sum())
    return figures
