"""Pixels on the device: normalised from bytes, cut into patches.

Shape legend: B rows, C channels, p patch size, L patches in row order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the pixels CLIP was trained on, per channel."""


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, C, H, W] into [B, L, C p p], each patch in a convolution's order: channel, row, column."""
    rows, channels, height, width = images.shape
    tiles = images.view(rows, channels, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def cut_tubes(clips: Tensor, depth: int, patch: int) -> Tensor:
    """Cut clips [B, T, C, H, W] into [B, L, C d p p], d frames each, in a convolution's order: channel, frame, row."""
    rows, frames, channels, height, width = clips.shape
    shape = (rows, frames // depth, depth, channels, height // patch, patch, width // patch, patch)
    return clips.reshape(shape).permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(rows, -1, channels * depth * patch * patch)


def shrink(images: Tensor, size: int) -> Tensor:
    """uint8 images [B, C, H, W] at height and width `size`, bicubic with antialiasing: fp32 from 0 to 255."""
    resized = functional.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255)


class Normalise(nn.Module):
    """Bytes to zero-mean fp32: (x / 255 - mean) / std per channel, in one multiply-add; nothing is saved."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], repeat: int = 1) -> None:
        """`repeat`: neighbouring values of one channel in the last dimension (p p for flat patches)."""
        super().__init__()
        self.mean, self.std, self.repeat = mean, std, repeat
        self.register_buffer("scale", torch.empty(len(mean) * repeat), persistent=False)
        self.register_buffer("shift", torch.empty(len(mean) * repeat), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        mean, std = (torch.tensor(v, dtype=torch.float64).repeat_interleave(self.repeat) for v in (self.mean, self.std))
        self.scale.copy_(1 / (255 * std))
        self.shift.copy_(-mean / std)

    def forward(self, values: Tensor) -> Tensor:
        """Normalise values from 0 to 255, [..., C repeat]."""
        return torch.addcmul(self.shift, values.float(), self.scale)
