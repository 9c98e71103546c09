"""A network of torchvision as a tower: the places of its last feature map become tokens.

Enter: uint8 images [B, 3, S, S], or clips [B, T, 3, S, S]. Leave: tokens [B, L, D], time slowest, and their mean.
Refused: weights of another shape, sizes that the network does not divide, an architecture of another modality. Batch
norm never computes batch statistics here, because a row's result would then depend on the rows beside it and no longer
be the same for every number of ranks and micro-batches: with weights it uses theirs, without it is group norm.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.config import Rule
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.layers.pixels import Normalise
from mmpretrain.models.convnets import ARCHITECTURES, ImageName, Statistics, VideoName, build_trunk, load_network
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import TowerFacts


class TorchvisionTowerConfig(TowerConfig):
    """A residual, separable or Swin network of torchvision, for images or videos."""

    kind: Literal["torchvision"] = "torchvision"
    name: ImageName | VideoName = "resnet50"
    """Architecture: resnet* read images, the others videos."""
    weights: str | None = None
    """A local .safetensors or .pth file, or the name of published weights (IMAGENET1K_V2); null: start fresh."""
    image_size: int = Field(224, gt=0)
    """Height and width of the images or frames in pixels."""
    frames: int | None = Field(None, gt=0)
    """Frames of a clip, for videos; null: 16."""
    mean: Statistics | None = None
    """Mean of the pixels / 255, per channel; null: that of the published weights."""
    std: Statistics | None = None
    """Standard deviation of the pixels / 255, per channel; null: that of the published weights."""

    def broken_rules(self) -> Iterable[Rule]:
        if self.reads == "image" and self.frames is not None:
            yield ("frames",), f"{self.name} reads single images; remove it, or put it into a tower of kind frames"
        for field, (size, stride) in self._axes().items():
            if size % stride:
                yield (field,), f"{self.name} shrinks it {stride} times; use {size // stride * stride or stride}"

    @property
    def reads(self) -> str:
        """The modality of the architecture."""
        return "image" if len(ARCHITECTURES[self.name].strides) == 1 else "video"

    @property
    def num_tokens(self) -> int:
        """Places of the last feature map."""
        size, stride = self._axes()["image_size"]
        times, shrunk = self._axes().get("frames", (1, 1))
        return times // shrunk * (size // stride) ** 2

    def _axes(self) -> dict[str, tuple[int, int]]:
        """Field -> its size, and how many times the network shrinks it."""
        strides = ARCHITECTURES[self.name].strides
        space = {"image_size": (self.image_size, strides[-1])}
        return space if self.reads == "image" else {"frames": (self.clip_frames, strides[0])} | space

    @property
    def clip_frames(self) -> int:
        """Frames of a clip, given or not."""
        return 16 if self.frames is None else self.frames

    def check(self, modality: str) -> None:
        if modality != self.reads:
            raise ValueError(
                f"a tower of kind torchvision with the name {self.name} reads {self.reads}s, not {modality!r}; name "
                f"the tower {self.reads} or choose another architecture"
            )

    def input_field(self, modality: str) -> FieldSpec:
        image = (3, self.image_size, self.image_size)
        return FieldSpec(image if self.reads == "image" else (self.clip_frames, *image), "uint8")

    def build(self, modality: str) -> "TorchvisionTower":
        return TorchvisionTower(self)


class TorchvisionTower(Tower):
    """The network up to its last feature map."""

    def __init__(self, config: TorchvisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        mean, std = ARCHITECTURES[config.name].statistics
        self.normalise = Normalise(config.mean or mean, config.std or std)
        self.trunk = build_trunk(config.name, trained=config.weights is not None)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError(
                "a tower of kind torchvision cannot leave patches out; masked autoencoding needs kind native"
            )
        tokens = self.trunk(self.normalise(inputs.movedim(-3, -1)).movedim(-1, 1))
        return {"tokens": tokens, "pooled": tokens.mean(dim=1)}

    def facts(self) -> TowerFacts:
        return TowerFacts(ARCHITECTURES[self.config.name].width, self.config.num_tokens, num_prefix=0)

    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks()

    def load_pretrained(self) -> None:
        if self.config.weights is not None:
            load_network(self.trunk, self.config.name, self.config.weights)
