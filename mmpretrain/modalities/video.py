"""Videos: bytes become frames in a worker, tubes of pixels become tokens on the device.

Enter: video members, then uint8 [B, T, 3, H, W]. Leave: tokens [B, L, D], and for masked autoencoding the tubes
themselves. Refused: members without pictures, damaged, cut off or too large; sizes that tubes do not divide.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.core.config import Rule
from mmpretrain.core.containers import require
from mmpretrain.core.errors import AbsentError
from mmpretrain.core.media_types import VIDEO_EXTENSIONS
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.core.video_bytes import Frames, OpenVideo, VideoLimits, open_video
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.parameters import LearnedPositions, SpaceTimePositions
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD, Normalise, cut_tubes
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.modalities.base import CodecConfig, PatchStem, StemConfig


class TubesStemConfig(StemConfig):
    """Square patches through a few frames, each projected to the tower's width, with positions."""

    kind: Literal["tubes"] = "tubes"
    frames: int = Field(16, gt=0)
    """Frames of a clip."""
    image_size: int = Field(224, gt=0)
    """Height and width of the frames in pixels."""
    patch_size: int = Field(16, gt=0)
    """Height and width of a tube in pixels."""
    tube_frames: int = Field(2, gt=0)
    """Length of a tube in frames."""
    bias: bool = True
    """Give the projection a bias."""
    positions: Literal["factorised", "learned", "sincos"] = "factorised"
    """factorised: one vector per time and one per place; learned: one per tube; sincos: fixed."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of the pixels / 255, per channel."""
    std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of the pixels / 255, per channel."""

    def broken_rules(self) -> Iterable[Rule]:
        for name, size, part, of in (
            ("patch_size", self.image_size, self.patch_size, "image_size"),
            ("tube_frames", self.frames, self.tube_frames, "frames"),
        ):
            if size % part:
                yield (name,), f"{of} {size} is not a multiple of {name} {part}; use {size // part * part or part}"

    @property
    def modality(self) -> str:
        return "video"

    @property
    def input_field(self) -> FieldSpec:
        return FieldSpec((self.frames, 3, self.image_size, self.image_size), "uint8")

    def build(self, width: int) -> "TubesStem":
        return TubesStem(self, width)


class TubesStem(PatchStem):
    """A three-dimensional convolution without overlap as a reshape and one matrix product."""

    def __init__(self, config: TubesStemConfig, width: int) -> None:
        super().__init__()
        size, edge = config.patch_size, config.image_size // config.patch_size
        self.patch_shape = (3, config.tube_frames, size, size)
        self.grid = (config.frames // config.tube_frames, edge, edge)
        self.num_tokens = math.prod(self.grid)
        self.normalise = Normalise(config.mean, config.std, repeat=config.tube_frames * size * size)
        fan_in = math.prod(self.patch_shape)
        self.project = Linear(fan_in, width, std=(3 * fan_in) ** -0.5, bias=config.bias)
        self.positions = _positions(config.positions, self.grid, width)

    def patchify(self, inputs: Tensor) -> Tensor:
        _, frames, size, _ = self.patch_shape
        tubes: Tensor = self.normalise(cut_tubes(inputs, frames, size))
        return tubes

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.positions(self.project(self.patchify(inputs)))
        return tokens


def _positions(kind: str, grid: tuple[int, int, int], width: int) -> nn.Module:
    times, rows, columns = grid
    if kind == "factorised":
        return SpaceTimePositions(times, rows * columns, width, std=(2 * width) ** -0.5)
    if kind == "learned":
        return LearnedPositions(math.prod(grid), width, std=width**-0.5)
    return SinCosPositions(grid, width)


class VideoCodecConfig(CodecConfig):
    """How videos become clips; number and size of the frames come from the model's video tower."""

    kind: Literal["video"] = "video"
    seconds: float | None = Field(None, gt=0)
    """Length of the stretch over which the frames are spread evenly, at a random place in training and in the middle in
    evaluation; null: the whole video, unless frame_rate is given."""
    frame_rate: float | None = Field(None, gt=0)
    """Frames per second of the clip, wherever it begins; null: the frames are spread evenly."""
    crop: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest part of the shorter side that a random crop keeps in training, the same for all frames."""
    flip: bool = False
    """Mirror half of the videos; captions that say left and right, and motions, then lie."""
    max_pixels: int = Field(8_900_000, gt=0)
    """Videos with more pixels per frame (4096 x 2160) are unusable, and nothing of them is decoded."""
    max_seconds: float = Field(3600.0, gt=0)
    """Longer videos are unusable."""
    max_frames: int = Field(250_000, gt=0)
    """Videos with more frames are unusable."""

    def broken_rules(self) -> Iterable[Rule]:
        low, high = self.crop
        if not 0 < low <= high <= 1:
            yield ("crop",), f"saw {[low, high]}, expected 0 < smallest <= largest <= 1"
        if self.seconds is not None and self.frame_rate is not None:
            yield ("seconds",), "follows from frame_rate and the tower's number of frames; give one of both"

    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "VideoCodec":
        require("av", "video", "decoding video")
        frames, _, height, width = inputs["video"].shape
        return VideoCodec(frames, height, width, self)


@dataclass(frozen=True)
class VideoCodec:
    """Decodes, crops and resizes the frames of a clip to uint8 [frames, 3, height, width]."""

    frames: int
    height: int
    width: int
    config: VideoCodecConfig

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {"video": FieldSpec((self.frames, 3, self.height, self.width), "uint8")}

    @property
    def extensions(self) -> frozenset[str]:
        return VIDEO_EXTENSIONS

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        config = self.config
        limits = VideoLimits(config.max_pixels, config.max_seconds, config.max_frames)
        with open_video(_video_member(members), limits) as video:
            frames = video.read(video.frames_at(self._times(video, draw)))
        clip = self._resized(frames, draw)
        return {"video": clip[..., ::-1] if config.flip and draw is not None and draw.random() < 0.5 else clip}

    def _times(self, video: OpenVideo, draw: np.random.Generator | None) -> NDArray[np.float64]:
        """When the frames are taken, in seconds; a video that is too short goes on with its last frame."""
        rate, numbers = self.config.frame_rate, np.arange(self.frames)
        span = self.frames / rate if rate is not None else min(self.config.seconds or math.inf, video.seconds)
        spare = max(0.0, video.seconds - span)
        begin = spare / 2 if draw is None else draw.uniform(0, spare)
        if rate is not None:
            return begin + numbers / rate
        within = 0.5 if draw is None else draw.random(self.frames)  # one frame of each part (TSN, arXiv 1608.00859)
        times: NDArray[np.float64] = begin + (numbers + within) * span / self.frames
        return times

    def _resized(self, frames: Frames, draw: np.random.Generator | None) -> NDArray[np.uint8]:
        """The same part of all frames as [T, 3, height, width], bicubic with antialiasing on uint8."""
        _, height, width, _ = frames.shape
        kept = 1.0 if draw is None else draw.uniform(*self.config.crop)
        scale = kept * min(height / self.height, width / self.width)
        rows, columns = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        across, down = (0.5, 0.5) if draw is None else draw.random(2)
        top, left = round((height - rows) * down), round((width - columns) * across)
        part = np.ascontiguousarray(frames[:, top : top + rows, left : left + columns])
        stack = torch.from_numpy(part).permute(0, 3, 1, 2)
        size = (self.height, self.width)
        resized: NDArray[np.uint8] = functional.interpolate(stack, size=size, mode="bicubic", antialias=True).numpy()
        return resized


def _video_member(members: Mapping[str, bytes]) -> bytes:
    for extension, content in members.items():
        if extension in VIDEO_EXTENSIONS:
            return content
    raise AbsentError(f"no video member (saw: {', '.join(members)})")
