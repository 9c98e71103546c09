"""Images: bytes become pixels in a worker, patches of pixels become tokens on the device.

Enter: image members, then uint8 [B, 3, H, W]. Leave: tokens [B, L, D], and for masked autoencoding the patches
themselves. Refused: members that are no image; an image size that the patch size does not divide.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.core.config import Rule
from mmpretrain.core.errors import AbsentError, SampleError
from mmpretrain.core.image_bytes import EncodedImage, Pixels, read_header
from mmpretrain.core.media_types import IMAGE_EXTENSIONS
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.parameters import GridPositions
from mmpretrain.layers.phases import Moment, Phased, from_the_start, phase_at
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD, Normalise, cut_patches, shrink
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.modalities.base import CodecConfig, PatchStem, StemConfig


class SizePhase(Moment):
    """How large images are from a step on."""

    image_size: PositiveInt
    """Height and width in pixels, to which the device shrinks them."""


class PatchesStemConfig(StemConfig):
    """Square patches, each projected to the tower's width, with positions."""

    kind: Literal["patches"] = "patches"
    image_size: int = Field(224, gt=0)
    """Height and width of the images in pixels."""
    patch_size: int = Field(16, gt=0)
    """Height and width of a patch in pixels."""
    phases: Annotated[tuple[SizePhase, ...], AfterValidator(from_the_start)] = ()
    """Smaller images at first, e.g. [{from_step: 0, image_size: 112}, {from_step: 9000, image_size: 224}] (CLIPA,
    arXiv 2305.07017); the last phase has image_size, which evaluation always has."""
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

    def broken_rules(self) -> Iterable[Rule]:
        for index, phase in enumerate(self.phases):
            size = phase.image_size
            if size % self.patch_size or size > self.image_size:
                yield (
                    ("phases", index, "image_size"),
                    f"{size} is no multiple of patch_size {self.patch_size} up to image_size {self.image_size}; use "
                    f"{min(self.image_size, max(1, size // self.patch_size) * self.patch_size)}",
                )
        if self.phases and self.phases[-1].image_size != self.image_size:
            yield (
                ("phases",),
                f"the last phase has images of {self.phases[-1].image_size} pixels, and evaluation has image_size "
                f"{self.image_size}; end with a phase of {self.image_size}",
            )

    @property
    def last_phase(self) -> int:
        return self.phases[-1].from_step if self.phases else 0

    @property
    def modality(self) -> str:
        return "image"

    @property
    def input_field(self) -> FieldSpec:
        return FieldSpec((3, self.image_size, self.image_size), "uint8")

    def build(self, width: int) -> "PatchesStem":
        return PatchesStem(self, width)


class PatchesStem(PatchStem, Phased):
    """The convolution of a ViT's stem as a reshape and one matrix product, whose result is contiguous."""

    def __init__(self, config: PatchesStemConfig, width: int) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_shape = (3, size, size)
        self.phases = config.phases or (SizePhase(from_step=0, image_size=config.image_size),)
        edge = config.image_size // size
        self.grid = (edge, edge)
        self.num_tokens = edge * edge
        self.normalise = Normalise(config.mean, config.std, repeat=size * size)
        fan_in = math.prod(self.patch_shape)
        self.project = Linear(fan_in, width, std=(3 * fan_in) ** -0.5, bias=config.bias)
        self.positions: nn.Module = (
            GridPositions(self.grid, width, std=width**-0.5)
            if config.positions == "learned"
            else SinCosPositions(self.grid, width)
        )
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        self.size = phase_at(self.phases, step).image_size

    @property
    def tokens_now(self) -> int:
        return math.prod(self._grid_now)

    @property
    def _grid_now(self) -> tuple[int, int]:
        edge = self.size // self.patch_shape[-1] if self.training else self.grid[0]
        return (edge, edge)

    def patchify(self, inputs: Tensor) -> Tensor:
        patches: Tensor = self.normalise(cut_patches(inputs, self.patch_shape[-1]))
        return patches

    def forward(self, inputs: Tensor) -> Tensor:
        if self._grid_now != self.grid:
            inputs = shrink(inputs, self.size)
        tokens: Tensor = self.positions(self.project(self.patchify(inputs)), self._grid_now)
        return tokens


class ImageCodecConfig(CodecConfig):
    """How image members become pixels; the size comes from the model's image tower."""

    kind: Literal["image"] = "image"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a random crop keeps in training."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest shape (width / height) of a random crop, before it is resized to the tower's."""
    flip: bool = False
    """Mirror half of the images; captions that say left and right then lie."""
    max_pixels: int = Field(64_000_000, gt=0)
    """Images with more pixels are unusable, and nothing of them is decoded; evaluation resizes none to more either."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """gpu: on a CUDA device training leaves ordinary JPEGs to nvJPEG, whose pixels differ by rounding; all else is
    decoded as with cpu."""
    max_jpeg_bytes: int = Field(2**18, ge=1024)
    """Longer JPEGs are not left to the GPU; with decode: gpu each row of a batch has room for as many bytes."""

    def broken_rules(self) -> Iterable[Rule]:
        for name, (low, high), limit in (
            ("crop_scale", self.crop_scale, 1.0),
            ("crop_ratio", self.crop_ratio, math.inf),
        ):
            if not 0 < low <= high <= limit:
                yield (name,), f"saw {[low, high]}, expected 0 < smallest <= largest{' <= 1' if limit == 1 else ''}"

    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "ImageCodec":
        _, height, width = inputs["image"].shape
        return ImageCodec(height, width, self)


@dataclass(frozen=True)
class ImageCodec:
    """Decodes, crops and resizes one image to uint8 [3, height, width]; normalisation is left to the device.

    Training cuts a random resized crop; without a draw the shorter side is resized and the centre is cut.
    """

    height: int
    width: int
    config: ImageCodecConfig

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {"image": FieldSpec((3, self.height, self.width), "uint8")}

    @property
    def extensions(self) -> frozenset[str]:
        return IMAGE_EXTENSIONS

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        image = self.header(members)
        return {"image": self._centre(image) if draw is None else self.pixels(image, self.draw_view(image, draw))}

    def header(self, members: Mapping[str, bytes]) -> EncodedImage:
        """What the image's first bytes tell."""
        return read_header(_image_member(members), self.config.max_pixels)

    def draw_view(self, image: EncodedImage, draw: np.random.Generator) -> "View":
        """What training sees of an image."""
        box = _random_box(image, self.config.crop_scale, self.config.crop_ratio, draw)
        return View(box, self.config.flip and draw.random() < 0.5)

    def pixels(self, image: EncodedImage, view: "View") -> NDArray[np.uint8]:
        """Decode, cut and resize to [3, height, width]."""
        pixels = _resized(image, view.box, self.height, self.width)
        return pixels[:, :, ::-1] if view.mirrored else pixels

    def _centre(self, image: EncodedImage) -> NDArray[np.uint8]:
        scale = max(self.height / image.height, self.width / image.width)
        height, width = max(self.height, int(image.height * scale)), max(self.width, int(image.width * scale))
        most = max(self.config.max_pixels, _MAX_OBLONG * self.height * self.width)
        if height * width > most:
            raise SampleError(
                f"the image has {image.width} x {image.height} pixels, so far from square that it would be resized to "
                f"{width} x {height}, more than {most} pixels"
            )
        pixels = _resized(image, Box(0, 0, image.height, image.width), height, width)
        top, left = round((height - self.height) / 2), round((width - self.width) / 2)
        return pixels[:, top : top + self.height, left : left + self.width]


@dataclass(frozen=True)
class Box:
    """Part of an image, in pixels of its full size."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """What is seen of an image."""

    box: Box
    mirrored: bool


_CROP_ATTEMPTS = 10
_MAX_OBLONG = 100
"""Tower sizes to which the whole of an image is resized in evaluation, whatever max_pixels says."""
_DECODE_MARGIN = 2
"""A JPEG is decoded at a fraction of its size where the crop still has twice the pixels of the result: over 50 dB from
the full decode, where exactly as many pixels as the result has would lose 10 dB more."""


def _image_member(members: Mapping[str, bytes]) -> bytes:
    for extension, content in members.items():
        if extension in IMAGE_EXTENSIONS:
            return content
    raise AbsentError(f"no image member (saw: {', '.join(members)})")


def _random_box(
    image: EncodedImage, scale: tuple[float, float], ratio: tuple[float, float], draw: np.random.Generator
) -> Box:
    """A box of random area, shape and place (Szegedy et al., arXiv 1409.4842); the whole image where none fits."""
    area = image.height * image.width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        target = area * draw.uniform(*scale)
        shape = math.exp(draw.uniform(log_low, log_high))
        height, width = round(math.sqrt(target / shape)), round(math.sqrt(target * shape))
        if 0 < height <= image.height and 0 < width <= image.width:
            top, left = draw.integers(image.height - height + 1), draw.integers(image.width - width + 1)
            return Box(int(top), int(left), height, width)
    shape = min(max(image.width / image.height, ratio[0]), ratio[1])
    height = max(1, min(image.height, round(image.width / shape)))
    width = max(1, min(image.width, round(image.height * shape)))
    return Box((image.height - height) // 2, (image.width - width) // 2, height, width)


def _resized(image: EncodedImage, box: Box, height: int, width: int) -> NDArray[np.uint8]:
    """The box as [3, height, width], bicubic with antialiasing on uint8."""
    room = min(box.height / height, box.width / width) / _DECODE_MARGIN
    pixels = image.read(shrink=next((shrink for shrink in (8, 4, 2) if room >= shrink), 1))
    part = torch.from_numpy(np.ascontiguousarray(_cut(pixels, image, box)))
    stack = part.permute(2, 0, 1).unsqueeze(0)
    resized = functional.interpolate(stack, size=(height, width), mode="bicubic", antialias=True)
    result: NDArray[np.uint8] = resized[0].numpy()
    return result


def _cut(pixels: Pixels, image: EncodedImage, box: Box) -> Pixels:
    """The box from pixels that may be decoded at a fraction of the full size."""
    down, across = pixels.shape[0] / image.height, pixels.shape[1] / image.width
    rows = slice(round(box.top * down), round((box.top + box.height) * down))
    columns = slice(round(box.left * across), round((box.left + box.width) * across))
    return pixels[rows, columns]
