"""An image tower run on every frame of a video, and a transformer over time upon the frames' vectors.

Enter: uint8 [B, T, 3, H, W]. Leave: one token per frame [B, T, D] that has seen the others, and their mean. Refused: a
tower inside that does not read images, heads that do not divide its width. It can start from image weights and costs as
much as T images (ViViT's factorised encoder, Arnab et al., arXiv 2103.15691, section 3.3).
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.blocks import Transformer
from mmpretrain.layers.parameters import LearnedPositions
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.models.towers.hf_auto import HFAutoTowerConfig
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.models.towers.torchvision import TorchvisionTowerConfig
from mmpretrain.objectives.base import TowerFacts

ImageTowerUnion = Annotated[NativeTowerConfig | HFAutoTowerConfig | TorchvisionTowerConfig, Field(discriminator="kind")]


class FramesTowerConfig(TowerConfig):
    """Frames through an image tower, then attention over time."""

    kind: Literal["frames"] = "frames"
    image: ImageTowerUnion
    """The tower that reads one frame."""
    frames: int = Field(8, gt=0)
    """Frames of a clip."""
    depth: int = Field(4, gt=0)
    """Blocks over time."""
    heads: int = Field(12, gt=0)
    """Attention heads over time; they divide the width of the image tower."""

    def check(self, modality: str) -> None:
        if modality != "video":
            raise ValueError(f"a tower of kind frames reads videos, not {modality!r}; name it video")
        self.image.check("image")
        if isinstance(self.image, NativeTowerConfig) and self.image.patch_dropout != 0.0:
            raise ValueError("patch_dropout of the image tower inside a tower of kind frames is not done; remove it")

    @property
    def last_phase(self) -> int:
        return self.image.last_phase

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        return self.model_copy(update={"image": self.image.resolve("image", tokenizer)})

    def reads_elsewhere(self, modality: str) -> bool:
        return self.image.reads_elsewhere("image")

    def input_field(self, modality: str) -> FieldSpec:
        image = self.image.input_field("image")
        return FieldSpec((self.frames, *image.shape), image.dtype)

    def build(self, modality: str) -> "FramesTower":
        return FramesTower(self)


class FramesTower(Tower):
    """The image tower's pooled vectors with a position in time each, blocks, final norm, mean."""

    def __init__(self, config: FramesTowerConfig) -> None:
        super().__init__()
        self.image = config.image.build("image")
        width = self.image.facts().width
        if width % config.heads:
            raise ConfigError(
                f"heads {config.heads} of the video tower do not divide the width {width} of its image tower; choose "
                "heads that do"
            )
        self.positions = LearnedPositions(config.frames, width, std=width**-0.5)
        self.transformer = Transformer(width, config.depth, config.heads)
        self.norm = nn.LayerNorm(width)
        self._facts = TowerFacts(width=width, num_tokens=config.frames, num_prefix=0)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError("a tower of kind frames cannot leave tubes out; masked autoencoding needs kind native")
        pooled: Tensor = self.image(inputs.flatten(0, 1))["pooled"]
        tokens = self.positions(pooled.unflatten(0, inputs.shape[:2]))  # type: ignore[no-untyped-call]
        tokens = self.norm(self.transformer(tokens))
        return {"tokens": tokens, "pooled": tokens.mean(dim=1)}

    def facts(self) -> TowerFacts:
        return self._facts

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.image.blocks(), *self.transformer.blocks]

    def load_pretrained(self) -> None:
        self.image.load_pretrained()
