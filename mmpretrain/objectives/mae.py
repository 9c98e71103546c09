"""Masked modelling of images, spectrograms and videos by reconstruction of patches (MAE, arXiv 2111.06377).

Enter: a chunk of which each row shows a fixed number of patches, chosen by its random key. Leaves: the mean squared
error of each hidden patch, summed, against its pixels normalised within the patch. The tower runs on the visible
patches only; with other modalities in sight, the fusion joins what it says of them with those (FLAVA's masked
multimodal modelling, arXiv 2112.04482, with pixels to predict). Legend as in `objectives/patches.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.objectives.base import Encoder, ModelFacts, Rebuilt
from mmpretrain.objectives.patches import HiddenPatches, HiddenPatchesConfig, at_patches

_EPSILON = 1e-6
"""Added to the variance of a patch, as published."""


def normalise_patches(patches: Tensor) -> Tensor:
    """Zero mean and unit (sample) variance within each patch, [..., pixels]."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPSILON).sqrt()


class MaskedAutoencoding(HiddenPatches):
    """Reconstruct the patches a tower did not see."""

    def encode(self, encoder: Encoder) -> TensorDict:
        split = self.masking(encoder.batch["draw"])
        targets = normalise_patches(at_patches(encoder.patches(self.modality), split.hidden))
        errors = (self.predict(encoder, split) - targets).square().mean(-1).sum(1)
        return {"sum": errors.masked_fill(~self.present(encoder.batch), 0.0).sum().view(1)}

    def rebuild(self, encoder: Encoder) -> Rebuilt:
        """Predictions with the mean and spread of the patch they stand for, which the loss leaves out."""
        split, patches = self.masking(encoder.batch["draw"]), encoder.patches(self.modality)
        variance, mean = torch.var_mean(at_patches(patches, split.hidden), dim=-1, keepdim=True)
        guesses = self.predict(encoder, split) * (variance + _EPSILON).sqrt() + mean
        hidden = torch.zeros_like(patches[..., 0], dtype=torch.bool).scatter(1, split.hidden, True)
        places = split.hidden[:, :, None].expand_as(guesses)
        return Rebuilt(self.modality, patches, patches.scatter(1, places, guesses), hidden)


class MAEConfig(HiddenPatchesConfig):
    """Masked modelling of images, spectrograms or videos."""

    kind: Literal["mae"] = "mae"

    def build(self, facts: ModelFacts) -> MaskedAutoencoding:
        self.masking_of(facts.towers[self.modality])
        shape = facts.towers[self.modality].patch_shape
        assert shape is not None, "a grid of patches has patches of some shape"
        return MaskedAutoencoding(self, facts, math.prod(shape))
