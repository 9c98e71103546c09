"""Masked modelling of features: what a teacher that sees all says of the patches a tower does not see (data2vec).

Enter: a chunk of which each row shows a fixed number of patches. Leaves: the smooth L1 or squared distance between
prediction and target at each hidden patch, summed. The teacher is a moving average of the tower (arXiv 2202.03555); its
targets are the mean over its upper blocks, each normalised. As in data2vec 2.0 (arXiv 2212.07525) the tower runs on the
visible patches alone and a small decoder predicts. Refuses towers without such blocks. Legend as in
`objectives/patches.py`; T target width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.config import Rule
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.patch_masking import Layout
from mmpretrain.layers.teacher import Teacher
from mmpretrain.objectives.base import Average, Encoder, ModelFacts
from mmpretrain.objectives.patches import HiddenPatches, HiddenPatchesConfig, at_patches


class FeatureModelling(HiddenPatches):
    """Predict the teacher's features of the patches a tower did not see."""

    scaffolding: ClassVar[tuple[str, ...]] = ("teacher",)

    def __init__(self, config: Data2VecConfig, facts: ModelFacts) -> None:
        super().__init__(config, facts, facts.towers[config.modality].width)
        self.config = config
        self.teacher = Teacher(facts.build_tower(config.modality))

    def encode(self, encoder: Encoder) -> TensorDict:
        batch, split = encoder.batch, self.masking(encoder.batch["draw"])
        everything = self.teacher.targets(
            batch[self.modality], batch.get(f"{self.modality}.mask"), self.config.top_layers
        )
        targets, present = at_patches(everything, split.hidden), self.present(batch)
        errors = self._distance(self.predict(encoder, split), targets).mean(-1).sum(1)
        seen = targets.masked_fill(~present[:, None, None], 0.0).flatten(0, 1)
        return {
            "sum": errors.masked_fill(~present, 0.0).sum().view(1),
            "targets": torch.stack([seen.sum(0), seen.square().sum(0)]).flatten().view(1, -1),
            "count": (present.sum() * split.hidden.shape[1]).view(1),
        }

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Standard deviation of the targets over the hidden patches of the global batch, a mean over T; communicates.

        A teacher that collapsed says the same of every patch: below 0.1 the paper's code stops."""
        sums = all_reduce_sum(torch.cat([parts["targets"].sum(0), parts["count"].sum().view(1).float()]))
        mean, square = (sums[:-1] / sums[-1].clamp(min=1)).chunk(2)
        return {"target_std": (square - mean.square()).clamp(min=0).sqrt().mean()}

    def after_step(self, step: int, towers: Mapping[str, nn.Module], average: Average) -> None:
        average(self.teacher.network, towers[self.modality], self.config.decay_at(step) if step else 0.0)

    def _distance(self, predicted: Tensor, targets: Tensor) -> Tensor:
        if self.config.beta is None:
            return (predicted - targets).square()
        return functional.smooth_l1_loss(predicted, targets, reduction="none", beta=self.config.beta)


class Data2VecConfig(HiddenPatchesConfig):
    """Masked modelling of a teacher's features."""

    kind: Literal["data2vec"] = "data2vec"
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of the patches that are hidden."""
    masking: Layout = "block"
    """random: each patch by itself; tube: the same random places at all times; block: places in rectangles, the same at
    all times."""
    decoder_width: int = Field(default=384, gt=0, multiple_of=4)
    """Width of the decoder, a multiple of 4 for its fixed positions (of 16 for video)."""
    decoder_depth: int = Field(default=4, gt=0)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=6, gt=0)
    """Attention heads of the decoder."""
    top_layers: int = Field(default=6, gt=0)
    """Upper blocks of the teacher whose outputs are averaged to targets."""
    beta: float | None = Field(default=2.0, gt=0)
    """Where the smooth L1 distance turns from squared to linear; null: squared everywhere."""
    decay_start: float = Field(default=0.999, ge=0, le=1)
    """Share of its weights that the teacher keeps after the first step; the tower's fill the rest."""
    decay_end: float = Field(default=0.9998, ge=0, le=1)
    """The same from step `decay_steps` on."""
    decay_steps: int = Field(default=30_000, ge=0)
    """Steps over which the share runs straight from start to end."""

    def broken_rules(self) -> Iterable[Rule]:
        if self.decay_end < self.decay_start:
            yield (
                ("decay_end",),
                f"{self.decay_end} is below decay_start {self.decay_start}; a teacher grows slower, so swap them",
            )

    def decay_at(self, step: int) -> float:
        """The share kept after step `step`, counted from 1 (tau of the paper)."""
        share = min(1.0, step / self.decay_steps) if self.decay_steps else 1.0
        return self.decay_start + share * (self.decay_end - self.decay_start)

    def build(self, facts: ModelFacts) -> FeatureModelling:
        tower = facts.towers[self.modality]
        self.masking_of(tower)
        if self.top_layers > tower.num_layers:
            raise ConfigError(
                f"data2vec.top_layers {self.top_layers} of a tower that tells {tower.num_layers} layers "
                f"({self.modality!r}); use at most as many, of a native tower"
            )
        return FeatureModelling(self, facts)
