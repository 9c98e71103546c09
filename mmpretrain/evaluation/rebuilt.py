"""What objectives that predict hidden patches make of a few samples, to look at.

Enter: objectives and the main rank's first rows. Leave: `evaluation/rebuilt/`, for each objective and sample a strip of
the input, what of it was in sight, and what was predicted: a picture, the middle frame of a video, a spectrogram with
low bands below. Where the hidden patches lie follows from the sample's key, so strips of two evaluations compare.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.core.collectives import rank
from mmpretrain.core.types import Picture
from mmpretrain.evaluation.base import EvaluationContext
from mmpretrain.objectives.base import Encoder, Objective, Rebuilt, TowerFacts

HEIGHT = 112
"""Of a strip in pixels; small inputs are enlarged."""
GAP = 4
_GREY = 0.5


def show_rebuilt(
    context: EvaluationContext,
    prefix: str,
    objectives: Mapping[str, Objective],
    encoder: Encoder,
    keys: Sequence[str],
) -> None:
    """Draw the first rows that have the modality; `keys` are theirs. Every rank calls it in lockstep."""
    for name, objective in objectives.items():
        with torch.no_grad(), context.autocast():
            rebuilt = objective.rebuild(encoder)
        if rebuilt is None or rank() or context.run_dir is None:
            continue
        present = encoder.batch[f"{rebuilt.modality}.present"].tolist()
        folder = context.run_dir / "evaluation" / "rebuilt" / f"{prefix}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        facts = context.model.facts.towers[rebuilt.modality]
        context.pictures[f"{prefix}/rebuilt_{name}"] = [
            _picture(folder / f"{row:02d}.png", key, views(rebuilt, facts, row))
            for row, key in enumerate(keys)
            if present[row]
        ]


def views(rebuilt: Rebuilt, facts: TowerFacts, row: int) -> list[Tensor]:
    """Input, what was in sight, and what was predicted, of one row: [channels, H, W] from 0 to 1 each."""
    whole = _canvas(rebuilt.patches[row], facts)
    low, high = (edge(whole.flatten(1), dim=1).view(-1, 1, 1) for edge in (torch.amin, torch.amax))
    shades = [
        ((view - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        for view in (whole, _canvas(rebuilt.predicted[row], facts))
    ]
    hidden = _canvas(rebuilt.hidden[row, :, None].expand_as(rebuilt.patches[row]).float(), facts) > 0
    return [shades[0], shades[0].masked_fill(hidden, _GREY), shades[1]]


def _canvas(patches: Tensor, facts: TowerFacts) -> Tensor:
    """Patches of one row, [L, prod(patch_shape)], put together: [channels, H, W], fp32 on the CPU."""
    shape, grid = facts.patch_shape, facts.patch_grid
    assert shape is not None and grid is not None, "an objective that rebuilds patches has a tower with a grid of them"
    tiles = patches.float().cpu().reshape(*grid, *shape)
    if len(grid) == 3:
        tiles = tiles[grid[0] // 2, :, :, :, shape[1] // 2]
    rows, columns, channels, height, width = tiles.shape
    canvas = tiles.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return canvas.flip(1) if channels == 1 else canvas


def _picture(path: Path, key: str, shown: Sequence[Tensor]) -> Picture:
    parts = [_image(view) for view in shown]
    strip = Image.new("RGB", (sum(part.width + GAP for part in parts) - GAP, HEIGHT), "white")
    left = 0
    for part in parts:
        strip.paste(part, (left, 0))
        left += part.width + GAP
    strip.save(path)
    return Picture(path, f"{key}: input, in sight, predicted")


def _image(view: Tensor) -> Image.Image:
    pixels = (view.expand(3, -1, -1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    image = Image.fromarray(pixels.numpy())
    return image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT), Image.Resampling.NEAREST)
