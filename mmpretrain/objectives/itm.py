"""Matching with hard negatives (ALBEF, arXiv 2107.07651): do these two belong together?

Enter: rows with both modalities of a pair. Leaves: cross-entropy of match and no match from the fused pooled vector,
summed over three pairs for each row: its own, its first with a hard negative second, its second with a hard negative
first. Negatives come from the batch of all ranks, in proportion to exp(scale * similarity) and never from the same
sample, and gradient flows back to the rank they come from. Refuses a fusion without a pooled vector (the model does).
Legend: b rows of this rank, B rows of all ranks, L tokens of a modality, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.collectives import all_reduce_sum, select_rows
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.hard_negatives import Negatives, Rows, draw_negatives
from mmpretrain.layers.output_head import OutputHead
from mmpretrain.layers.padding import lengthened
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.objectives.base import Encoder, FuseRows, ModelFacts, Objective, ObjectiveConfig
from mmpretrain.objectives.pairs import PairOfModalities, encode_pairs, pairs_present

SIDES = ("first", "second")
ASKED_PER_ROW = 3
"""One pair that belongs together, two that do not."""
MATCH, NO_MATCH = 1, 0


class Matching(Objective):
    """Tell pairs from others that look like pairs."""

    spans_batch: ClassVar[bool] = True

    def __init__(self, config: ITMConfig, facts: ModelFacts, fused_width: int) -> None:
        super().__init__()
        texts = {m: tower for m, tower in facts.towers.items() if tower.vocab_size is not None}
        self.lengths = {m: tower.num_prefix + tower.num_tokens for m, tower in texts.items()}
        self.pair, self.scale, self.tile = config.pair, config.scale, config.tile
        self.head = OutputHead(fused_width, outputs=2)

    def count(self, batch: TensorDict) -> Tensor:
        return ASKED_PER_ROW * pairs_present(batch, self.pair).sum(dtype=torch.float32)

    def encode(self, encoder: Encoder) -> TensorDict:
        """Embeddings that say who is alike, and for each side what the fusion reads of it: "first/tokens", ..."""
        parts = {name: part.detach() for name, part in encode_pairs(encoder, self.pair).items()}
        for side, modality in zip(SIDES, self.pair, strict=True):
            output = self._whole(modality, encoder.tower(modality))
            parts |= {f"{side}/{name}": part for name, part in _present(output, parts["present"]).items()}
        return parts | {name: encoder.batch[name] for name in ("sample", "draw")}

    def reduce_fused(self, parts: TensorDict, fuse: FuseRows) -> Tensor:
        first, second = ({name: parts[f"{side}/{name}"] for name in ("tokens", "mask", "pooled")} for side in SIDES)
        seconds, firsts = self.negatives(parts)
        asked = {
            self.pair[0]: _stacked(first, first, _select(first, firsts.numbers)),
            self.pair[1]: _stacked(second, _select(second, seconds.numbers), second),
        }
        logits = self.head(full_precision(fuse(asked)["pooled"]))
        matches, none = torch.full_like(seconds.numbers, MATCH), torch.full_like(seconds.numbers, NO_MATCH)
        targets = torch.cat([matches, none, none])
        asks = torch.cat([parts["present"], seconds.found, firsts.found])
        parts |= {"correct": (logits.detach().argmax(1) == targets) & asks, "asks": asks}
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses.masked_fill(~asks, 0.0).sum()

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Share of pairs that are told right, over the global batch; communicates."""
        correct, asked = all_reduce_sum(torch.stack([parts["correct"].sum(), parts["asks"].sum()]).float())
        return {"itm_acc": correct / asked.clamp(min=1)}

    def _whole(self, modality: str, output: TensorDict) -> TensorDict:
        """A text at the length it has untrimmed: its rows meet those of other micro-batches and ranks."""
        if modality not in self.lengths:
            return output
        return {
            name: part if name == "pooled" else lengthened(part, self.lengths[modality])
            for name, part in output.items()
        }

    def negatives(self, parts: TensorDict) -> tuple[Negatives, Negatives]:
        """A second for each first, and a first for each second. Communicates."""
        known = Rows(parts["present"], parts["sample"], parts["draw"])
        first, second = parts["first"], parts["second"]
        return (
            draw_negatives(self.scale * first, second, known, "itm.second", self.tile),
            draw_negatives(self.scale * second, first, known, "itm.first", self.tile),
        )


def _present(output: TensorDict, present: Tensor) -> TensorDict:
    """A tower's output with zeros, and no token that counts, in absent rows; a mask where the tower gives none."""
    tokens, pooled = output["tokens"], output["pooled"]
    counts = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return {
        "tokens": tokens.masked_fill(~present[:, None, None], 0.0),
        "mask": output.get("mask", counts) & present[:, None],
        "pooled": pooled.masked_fill(~present[:, None], 0.0),
    }


def _select(side: TensorDict, numbers: Tensor) -> TensorDict:
    """Rows of any rank. Communicates, in the backward too."""
    selected = {name: select_rows(side[name], numbers) for name in ("tokens", "pooled")}
    return selected | {"mask": select_rows(side["mask"].to(torch.uint8), numbers).bool()}


def _stacked(*sides: TensorDict) -> TensorDict:
    return {name: torch.cat([side[name] for side in sides]) for name in sides[0]}


class ITMConfig(ObjectiveConfig):
    """Image-text matching and its like; a contrast of the same pair beside it makes its negatives hard."""

    kind: Literal["itm"] = "itm"
    pair: PairOfModalities = ("image", "text")
    """The two modalities that match or do not."""
    scale: float = Field(default=1 / 0.07, ge=0)
    """Factor on the cosines of embeddings by which negatives are drawn; 0: all other samples are as likely."""
    tile: int | None = Field(default=None, ge=1)
    """Edge of the tiles in which similarities are computed, their memory; null chooses for the device."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.pair

    @property
    def needs_pooled(self) -> bool:
        return True

    def build(self, facts: ModelFacts) -> Matching:
        assert facts.fusion_width is not None, "the model config refuses an objective whose fused vector is not there"
        return Matching(self, facts, facts.fusion_width)
