"""Motion between neighbouring frames, computed on the device without learned weights.

Enter: uint8 clips. Leave: how far each pixel moves until the next frame. Lucas and Kanade's least squares in a window
(IJCAI 1981), repeated with the next frame warped back, from coarse to fine (Bouguet 2001). Legend: B rows, T frames,
N pairs of frames, H x W pixels.
"""

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.config import Config

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
_SMALLEST = 16
"""Pixels along the shorter side of the coarsest level."""
_DAMPING = 1e-5
"""Added to the squared slopes, of grey between 0 and 1: without texture the motion of the coarser level stays."""
_LONGEST_STEP = 1.0
"""Pixels by which one iteration may move; larger motions come from coarser levels."""


class LucasKanadeConfig(Config):
    """Classical optical flow, for motions of a few pixels from frame to frame."""

    kind: Literal["lucas_kanade"] = "lucas_kanade"
    levels: int = Field(4, gt=0)
    """Sizes at which motion is sought, each half of the one before; fewer for small frames."""
    iterations: int = Field(4, gt=0)
    """Steps at each size."""
    window: int = Field(9, gt=0)
    """Height and width in pixels of the window that is taken to move as one; odd."""

    @field_validator("window")
    @classmethod
    def _has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(f"a window of {window} pixels has no middle; use {window + 1}")
        return window

    def build(self) -> "LucasKanade":
        return LucasKanade(self)


class LucasKanade(nn.Module):
    """Frames to motions; a row depends on its own frames alone, and no gradient flows."""

    def __init__(self, config: LucasKanadeConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Map uint8 [B, T, 3, H, W] to pixels right and down, fp32 [B, T - 1, 2, H, W]."""
        with torch.autocast(clips.device.type, enabled=False):
            grey = (clips.float() * clips.new_tensor(_LUMA, dtype=torch.float32)[:, None, None]).sum(2) / 255
            levels = self._pyramid(grey.flatten(0, 1).unsqueeze(1))
            flow = levels[-1].new_zeros(1)
            for level in reversed(levels):
                frames = level.unflatten(0, clips.shape[:2])  # type: ignore[no-untyped-call]
                flow = self._refined(flow, frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
            motions: Tensor = flow.unflatten(0, (clips.shape[0], -1))  # type: ignore[no-untyped-call]
            return motions

    def _pyramid(self, frames: Tensor) -> list[Tensor]:
        """The frames [B T, 1, H, W] and their halves, finest first."""
        levels = [_smoothed(frames)]
        while len(levels) < self.config.levels and min(levels[-1].shape[-2:]) >= 2 * _SMALLEST:
            levels.append(_smoothed(F.avg_pool2d(levels[-1], 2)))
        return levels

    def _refined(self, coarse: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The motion [N, 2, H, W] from frames [N, 1, H, W] to the next, begun with that of the coarser level."""
        flow = first.new_zeros(first.shape[0], 2, *first.shape[-2:]) if coarse.dim() == 1 else _doubled(coarse, first)
        slopes = _slopes(first)
        squares = self._averaged(torch.cat([slopes * slopes, slopes[:, :1] * slopes[:, 1:]], dim=1))
        for _ in range(self.config.iterations):
            missing = first - _warped(second, flow)
            # a window moves as one: without this mean each pixel is warped by a motion of its own, and errors grow
            flow = self._averaged(flow + _solved(squares, self._averaged(slopes * missing)))
        return flow

    def _averaged(self, values: Tensor) -> Tensor:
        """The mean over the window around each pixel."""
        size = self.config.window
        return F.avg_pool2d(values, size, stride=1, padding=size // 2, count_include_pad=False)


def _smoothed(frames: Tensor) -> Tensor:
    """Blurred by the binomial window of five, so that slopes hold over a pixel and halving does not alias."""
    window = frames.new_tensor([1, 4, 6, 4, 1]) / 16
    padded = F.pad(frames, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, window.view(1, 1, 1, 5)), window.view(1, 1, 5, 1))


def _doubled(coarse: Tensor, like: Tensor) -> Tensor:
    """A motion at twice the size; an odd row or column of pixels has that of its neighbour."""
    return 2 * F.interpolate(coarse, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _slopes(frames: Tensor) -> Tensor:
    """Central differences to the right and downwards, [N, 2, H, W]."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.cat([right, down], dim=1)


def _warped(frames: Tensor, flow: Tensor) -> Tensor:
    """Frames [N, 1, H, W] seen where the motion leads."""
    height, width = frames.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    across, down = columns + flow[:, 0], rows + flow[:, 1]
    places = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)
    return F.grid_sample(frames, places, mode="bilinear", padding_mode="border", align_corners=False)


def _solved(squares: Tensor, products: Tensor) -> Tensor:
    """The step [N, 2, H, W] that solves the two normal equations of each window, in closed form."""
    xx, yy, xy = (squares + squares.new_tensor([_DAMPING, _DAMPING, 0.0])[:, None, None]).unbind(1)
    x, y = products.unbind(1)
    step = torch.stack([yy * x - xy * y, xx * y - xy * x], dim=1) / (xx * yy - xy * xy).unsqueeze(1)
    return step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
