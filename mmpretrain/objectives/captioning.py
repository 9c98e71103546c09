"""Captioning by a decoder of two halves (CoCa, arXiv 2205.01917): text alone, then text that looks at another modality.

Enter: rows with a text and what it describes. Leaves: cross-entropy of each token given those before it, summed over
the tokens that count. The first half is the text tower itself, which is causal and so serves contrast at the same time;
the second half is here. Refuses a text tower that sees later words. Legend: B rows, L tokens, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.adapters import Adapter
from mmpretrain.layers.blocks import CrossBlock
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.vocabulary_head import TokenHead, VocabularyBias
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective, ObjectiveConfig, TowerFacts
from mmpretrain.objectives.pairs import PairOfModalities, pairs_present


class CrossHalf(nn.Module):
    """Causal blocks over the text, each of which attends to the other modality's tokens."""

    def __init__(self, config: CaptioningConfig, width: int, context_width: int) -> None:
        super().__init__()
        scales, hidden = BlockScales(width, config.depth), int(width * config.mlp_ratio)
        self.context = Adapter(context_width, width)
        self.blocks = nn.ModuleList(CrossBlock(scales, config.heads, hidden, causal=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """Map tokens [B, L, D] and context [B, K, D'] to [B, L, D]."""
        adapted = self.context(context)
        for block in self.blocks:
            tokens = block(tokens, adapted, None, context_mask)
        normed: Tensor = self.norm(tokens)
        return normed


class Captioning(Objective):
    """Predict each word from the words before it and from what they describe."""

    def __init__(self, config: CaptioningConfig, text: TowerFacts, context: TowerFacts, vocab_size: int) -> None:
        super().__init__()
        self.pair = config.pair
        self.decoder = CrossHalf(config, text.width, context.width)
        self.head = TokenHead(text.width, text.width)
        self.bias = VocabularyBias(vocab_size)

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.pair[:1]

    def count(self, batch: TensorDict) -> Tensor:
        return self._predicted(batch).sum(dtype=torch.float32)

    def encode(self, encoder: Encoder) -> TensorDict:
        weights = self._predicted(encoder.batch)
        targets = encoder.batch[self.pair[1]][:, 1:]
        logits = self.logits(encoder)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        correct = (logits.detach().argmax(-1) == targets) & weights
        return {
            "sum": losses.masked_fill(~weights, 0.0).sum().view(1),
            "correct": correct.sum().view(1),
            "count": weights.sum().view(1),
        }

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Share of tokens that are told right, over the global batch; communicates."""
        correct, count = all_reduce_sum(torch.stack([parts["correct"].sum(), parts["count"].sum()]).float())
        return {"caption_acc": correct / count.clamp(min=1)}

    def logits(self, encoder: Encoder) -> Tensor:
        """Scores of the tokens after the first, [B, L - 1, V], each from those before it."""
        described, text = self.pair
        seen, context = encoder.tower(text)["tokens"][:, :-1], encoder.tower(described)
        hidden = self.head(self.decoder(seen, context["tokens"], context.get("mask")))
        scores: Tensor = self.bias(encoder.vocabulary_logits(text, hidden.flatten(0, 1)))
        return scores.view(*hidden.shape[:2], -1)

    def _predicted(self, batch: TensorDict) -> Tensor:
        """bool [B, L - 1]: tokens to predict: all after the first that are no padding, in rows with both modalities."""
        return batch[f"{self.pair[1]}.mask"][:, 1:] & pairs_present(batch, self.pair)[:, None]


class CaptioningConfig(ObjectiveConfig):
    """Image captioning and its like; CoCa weighs it 2 beside a contrast of weight 1."""

    kind: Literal["captioning"] = "captioning"
    pair: PairOfModalities = ("image", "text")
    """What is described, and the text that describes it."""
    depth: int = Field(default=6, gt=0)
    """Blocks of the half that looks at what is described."""
    heads: int = Field(default=8, gt=0)
    """Attention heads; they divide the width of the text tower."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs over the width."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.pair

    def build(self, facts: ModelFacts) -> Captioning:
        name, text = self.pair[1], facts.towers[self.pair[1]]
        if text.vocab_size is None:
            raise ConfigError(
                f"captioning predicts words, but tower {name!r} has no vocabulary; end the pair with text"
            )
        if not text.causal:
            raise ConfigError(
                f"captioning predicts each word from those before it, but tower {name!r} sees later words too; set "
                f"model.towers.{name}.causal to true, or use mlm"
            )
        if text.width % self.heads:
            raise ConfigError(
                f"captioning.heads {self.heads} does not divide the width {text.width} of tower {name!r}; choose heads "
                "that do"
            )
        return Captioning(self, text, facts.towers[self.pair[0]], text.vocab_size)
