"""Weights of one grid of patches for another: positions interpolated, kernels of images drawn out through time.

Enter: positions [L, D] of a grid, or a kernel [D, C p p]. Leave: positions of another grid, a kernel [D, C t p p].
Shape legend: L places of a grid that runs fastest along its last axis, D width, C channels, p patch, t frames.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, ...]


def resample_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """Positions of the grid `old`, [L, D], for the grid `new`.

    Two axes bicubic with antialiasing, as open_clip and timm do; a third axis in front, time, linear, or repeated where
    `old` has none. Along one axis a shorter grid keeps the first places as they are, since a text that fits is read
    from the same places; a longer one is interpolated linearly.
    """
    if len(new) == 3:
        return _through_time(positions, old if len(old) == 3 else (1, *old), new)
    if len(old) != len(new):
        raise ValueError(f"positions of a grid {list(old)} cannot become those of {list(new)}")
    if len(new) == 2:
        return _in_space(positions, old, new)
    return positions[: new[0]] if new[0] <= old[0] else _along(positions, new[0])


def inflate_kernel(kernel: Tensor, channels: int, frames: int) -> Tensor:
    """A patch projection [D, C p p] through `frames` frames, [D, C t p p], each with 1 / t of the weight.

    A clip of one repeated frame then gives what the image gives (Carreira and Zisserman 2017, arXiv 1705.07750, 3.1).
    """
    inflated = kernel.view(kernel.shape[0], channels, 1, -1).expand(-1, -1, frames, -1) / frames
    return inflated.flatten(1)


def _in_space(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    if old == new:
        return positions
    image = positions.float().T.reshape(1, -1, *old)
    resized = functional.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T.to(positions.dtype)


def _along(positions: Tensor, length: int) -> Tensor:
    line = positions.float().T[None]
    return functional.interpolate(line, size=length, mode="linear", align_corners=False)[0].T.to(positions.dtype)


def _through_time(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    frames = [_in_space(frame, old[1:], new[1:]) for frame in positions.view(old[0], math.prod(old[1:]), -1)]
    stack = torch.stack(frames)
    if old[0] == new[0]:
        return stack.flatten(0, 1)
    times = _along(stack.flatten(1), new[0]) if old[0] > 1 else stack.flatten(1).expand(new[0], -1)
    return times.reshape(math.prod(new), -1)
