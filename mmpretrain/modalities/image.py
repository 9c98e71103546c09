"""Images: patches of bytes become tokens on the device.

Enter: uint8 [B, 3, H, W]. Leave: tokens [B, L, D], and for masked autoencoding the patches themselves. Refused: an
image size that the patch size does not divide.
"""

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from mmpretrain.core.types import FieldSpec
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.parameters import LearnedPositions
from mmpretrain.layers.pixels import Normalise, cut_patches
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.modalities.base import PatchStem, StemConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchesStemConfig(StemConfig):
    """Square patches, each projected to the tower's width, with positions."""

    kind: Literal["patches"] = "patches"
    image_size: int = Field(224, gt=0)
    """Height and width of the images in pixels."""
    patch_size: int = Field(16, gt=0)
    """Height and width of a patch in pixels."""
    bias: bool = False
    """Give the patch projection a bias (SigLIP, MAE)."""
    positions: Literal["learned", "sincos"] = "learned"
    """learned: one vector per patch; sincos: fixed (MAE)."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of the pixels / 255, per channel."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of the pixels / 255, per channel."""

    @model_validator(mode="after")
    def _patches_fit(self) -> "PatchesStemConfig":
        if self.image_size % self.patch_size:
            fit = self.image_size // self.patch_size * self.patch_size or self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; use {fit}"
            )
        return self

    @property
    def modality(self) -> str:
        return "image"

    @property
    def input_field(self) -> FieldSpec:
        return FieldSpec((3, self.image_size, self.image_size), "uint8")

    def build(self, width: int) -> "PatchesStem":
        return PatchesStem(self, width)


class PatchesStem(PatchStem):
    """The convolution of a ViT's stem as a reshape and one matrix product, whose result is contiguous."""

    def __init__(self, config: PatchesStemConfig, width: int) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_shape = (3, size, size)
        grid = config.image_size // size
        self.num_tokens = grid * grid
        self.normalise = Normalise(config.mean, config.std, repeat=size * size)
        fan_in = math.prod(self.patch_shape)
        self.project = Linear(fan_in, width, std=(3 * fan_in) ** -0.5, bias=config.bias)
        self.positions: nn.Module = (
            LearnedPositions(self.num_tokens, width, std=width**-0.5)
            if config.positions == "learned"
            else SinCosPositions(grid, width)
        )

    def patchify(self, inputs: Tensor) -> Tensor:
        patches: Tensor = self.normalise(cut_patches(inputs, self.patch_shape[-1]))
        return patches

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.positions(self.project(self.patchify(inputs)))
        return tokens
