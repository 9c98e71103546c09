"""Masked language modelling (BERT, arXiv 1810.04805), alone or with other modalities in sight through the fusion.

Enter: a chunk whose text is masked anew at each position of the stream. Leaves: cross-entropy of the hidden tokens,
summed; only they reach the vocabulary. Rows without the text, or without a modality it is conditioned on, count
nothing. Refuses towers without a vocabulary or a mask token. Legend: B rows, K slots for hidden tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.token_masking import MaskedTokens, TokenMasking
from mmpretrain.layers.vocabulary_head import TokenHead, VocabularyBias
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective, TowerFacts
from mmpretrain.objectives.conditions import ConditionedConfig, rows_with, tokens_in_sight


class MaskedLanguageModelling(Objective):
    """Predict hidden tokens of a text."""

    def __init__(self, config: MLMConfig, tower: TowerFacts, hidden_width: int) -> None:
        super().__init__()
        self.modality, self.condition_on = config.modality, config.condition_on
        self.num_prefix = tower.num_prefix
        self.masking = config.masking(tower)
        self.head = TokenHead(hidden_width, tower.width)
        self.bias = VocabularyBias(self.masking.vocab_size)

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.condition_on

    def count(self, batch: TensorDict) -> Tensor:
        return self.masking.num_hidden(self._eligible(batch)).sum().float()

    def encode(self, encoder: Encoder) -> TensorDict:
        batch = encoder.batch
        masked = self.masking(batch[self.modality], self._eligible(batch), batch["draw"])
        hidden = self._hidden_states(encoder, masked).flatten(0, 1)
        logits = self.bias(encoder.vocabulary_logits(self.modality, self.head(hidden)))
        targets, weights = masked.targets.flatten(), masked.weights.flatten()
        losses = functional.cross_entropy(logits, targets, reduction="none") * weights
        correct = (logits.detach().argmax(-1) == targets) * weights
        return {
            "sum": losses.sum().view(1),
            "correct": correct.sum().view(1),
            "count": weights.sum().view(1),
        }

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Accuracy on the hidden tokens of the global batch; communicates."""
        correct, count = all_reduce_sum(torch.stack([parts["correct"].sum(), parts["count"].sum()]))
        return {"_".join((*self.condition_on, "mlm_acc")): correct / count.clamp(min=1)}

    def _eligible(self, batch: TensorDict) -> Tensor:
        present = rows_with(batch, (self.modality, *self.condition_on))
        return self.masking.eligible(batch[self.modality], batch[f"{self.modality}.mask"] & present[:, None])

    def _hidden_states(self, encoder: Encoder, masked: MaskedTokens) -> Tensor:
        """[B, K, D]: what the towers, or the fusion over them, say at the slots."""
        output = encoder.tower(self.modality, ids=masked.ids)
        tokens = tokens_in_sight(encoder, self.modality, output, self.condition_on)
        places = (masked.positions + self.num_prefix)[:, :, None].expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, places)


class MLMConfig(ConditionedConfig):
    """Masked language modelling."""

    kind: Literal["mlm"] = "mlm"
    modality: str = "text"
    """The text whose tokens are hidden."""
    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of each row's ordinary tokens that are hidden, at least one."""

    def masking(self, tower: TowerFacts) -> TokenMasking:
        """The masking over a tower's vocabulary."""
        if tower.vocab_size is None:
            raise ConfigError(
                f"mlm predicts words, but tower {self.modality!r} has no vocabulary; set modality to text"
            )
        if tower.causal:
            raise ConfigError(
                f"mlm predicts a hidden word from both sides, but tower {self.modality!r} is causal, so each token "
                f"sees only earlier ones; set model.towers.{self.modality}.causal to false, choose an encoder that "
                "reads both ways, or train it by captioning"
            )
        if tower.mask_id is None:
            raise ConfigError(
                f"mlm needs a mask token, but the tokenizer of tower {self.modality!r} has none; use one that defines "
                "mask_token, or drop the objective"
            )
        stream = ".".join(("mlm", self.modality, *self.condition_on))
        return TokenMasking(self.probability, tower.mask_id, tower.vocab_size, tower.special_ids, stream)

    def build(self, facts: ModelFacts) -> MaskedLanguageModelling:
        tower, width = facts.towers[self.modality], facts.fusion_width
        if not self.condition_on:
            return MaskedLanguageModelling(self, tower, tower.width)
        if width is None:
            raise ConfigError(
                f"mlm with condition_on {list(self.condition_on)} reads fused tokens, but the model has no fusion; set "
                "model.fusion.kind to joint or cross"
            )
        return MaskedLanguageModelling(self, tower, width)
