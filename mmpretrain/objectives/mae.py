"""Masked modelling of images, spectrograms and videos by reconstruction of patches (MAE, arXiv 2111.06377).

Enter: a chunk of which each row shows a fixed number of patches, chosen by its random key. Leaves: the mean squared
error of each hidden patch, summed, against its pixels normalised within the patch. The tower runs on the visible
patches only. Refuses towers without patches and ratios that hide none or all.
Legend: B rows, L patches, K visible ones, M = L - K hidden ones, D decoder width, P prefix tokens.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.blocks import Transformer
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.noise import uniform
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.layers.parameters import LearnedToken
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective, ObjectiveConfig, TowerFacts

_EPSILON = 1e-6
"""Added to the variance of a patch, as published."""


class Split(NamedTuple):
    """Patch numbers of each row in rising order: int64 [B, K] and [B, M]."""

    visible: Tensor
    hidden: Tensor


def split_patches(draw: Tensor, num_patches: int, num_visible: int, stream: str) -> Split:
    """Choose the patches of lowest noise as the visible ones."""
    order = uniform(draw, num_patches, stream).argsort(dim=1, stable=True)
    return Split(order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values)


def normalise_patches(patches: Tensor) -> Tensor:
    """Zero mean and unit (sample) variance within each patch, [..., pixels]."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPSILON).sqrt()


class PatchDecoder(nn.Module):
    """From tokens of the visible patches to pixels of the hidden ones."""

    def __init__(self, config: MAEConfig, tower: TowerFacts, grid: tuple[int, ...], patch_size: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.num_prefix = tower.num_prefix
        self.embed = Linear(tower.width, width, std=tower.width**-0.5)
        self.mask_token = LearnedToken(width, std=0.02)
        self.positions = SinCosPositions(grid, width)
        self.transformer = Transformer(width, config.decoder_depth, config.decoder_heads)
        self.norm = nn.LayerNorm(width)
        self.predict = Linear(width, patch_size, std=width**-0.5)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Map tokens [B, P + K, D'] to pixels [B, M, patch size]."""
        seen = self.embed(tokens)
        prefix, patches = seen[:, : self.num_prefix], seen[:, self.num_prefix :]
        num_patches = visible.shape[1] + hidden.shape[1]
        canvas = self.mask_token(patches.shape[0]).expand(-1, num_patches, -1).to(patches.dtype)
        canvas = self.positions(canvas.scatter(1, _wide(visible, patches), patches))
        decoded = self.transformer(torch.cat([prefix.to(canvas.dtype), canvas], dim=1))[:, self.num_prefix :]
        pixels: Tensor = self.predict(self.norm(decoded.gather(1, _wide(hidden, decoded))))
        return pixels


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """Repeat int64 [B, N] along the width of `like` [B, *, D], as gather and scatter want it."""
    return numbers[:, :, None].expand(-1, -1, like.shape[-1])


class MaskedAutoencoding(Objective):
    """Reconstruct the patches a tower did not see."""

    def __init__(self, config: MAEConfig, tower: TowerFacts) -> None:
        super().__init__()
        self.modality = config.modality
        self.num_patches, self.num_visible = tower.num_tokens, config.num_visible(tower.num_tokens)
        self.decoder = PatchDecoder(config, tower, *config.grid(tower))

    def count(self, batch: TensorDict) -> Tensor:
        return batch[f"{self.modality}.present"].sum().float() * (self.num_patches - self.num_visible)

    def encode(self, encoder: Encoder) -> TensorDict:
        stream = f"mae.{self.modality}"
        split = split_patches(encoder.batch["draw"], self.num_patches, self.num_visible, stream)
        tokens = encoder.tower(self.modality, keep=split.visible)["tokens"]
        predicted = full_precision(self.decoder(tokens, split.visible, split.hidden))
        patches = encoder.patches(self.modality)
        targets = normalise_patches(patches.gather(1, _wide(split.hidden, patches)))
        errors = (predicted - targets).square().mean(-1).sum(1)
        present = encoder.batch[f"{self.modality}.present"]
        return {"sum": errors.masked_fill(~present, 0.0).sum().view(1)}


class MAEConfig(ObjectiveConfig):
    """Masked modelling of images, spectrograms or videos."""

    kind: Literal["mae"] = "mae"
    modality: str = "image"
    """The modality whose patches are hidden."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that are hidden."""
    decoder_width: int = Field(default=512, gt=0, multiple_of=4)
    """Width of the decoder, a multiple of 4 for its fixed positions (of 16 for video)."""
    decoder_depth: int = Field(default=8, gt=0)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, gt=0)
    """Attention heads of the decoder."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> MAEConfig:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width {self.decoder_width} is not a multiple of decoder_heads {self.decoder_heads}; choose "
                "heads that divide the width"
            )
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    def num_visible(self, num_patches: int) -> int:
        """Patches the tower sees."""
        visible = round(num_patches * (1 - self.mask_ratio))
        if not 0 < visible < num_patches:
            raise ConfigError(
                f"mae with mask_ratio {self.mask_ratio} would show {visible} of {num_patches} patches; choose a ratio "
                "that hides some and shows some"
            )
        return visible

    def grid(self, tower: TowerFacts) -> tuple[tuple[int, ...], int]:
        """Patches along each axis, and numbers in a patch."""
        if tower.patch_shape is None or tower.patch_grid is None:
            raise ConfigError(
                f"mae rebuilds a grid of patches, but tower {self.modality!r} has none; use a native tower "
                "with a patch stem"
            )
        return tower.patch_grid, math.prod(tower.patch_shape)

    def build(self, facts: ModelFacts) -> MaskedAutoencoding:
        return MaskedAutoencoding(self, facts.towers[self.modality])
