"""Two streams for videos: what is seen, and how it moves (Simonyan and Zisserman, arXiv 1406.2199).

Enter: uint8 clips [B, T, 3, S, S] of neighbouring frames. Leave: tokens of both streams, or one of each, and the mean
of their pooled vectors. Refused: clips too short for a stack of motions. Motions are computed on the device, from the
very pixels of the clip, so that crops and mirrors hold for both streams. Legend: L motions of a stack, K stacks.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.adapters import Adapter
from mmpretrain.layers.optical_flow import LucasKanadeConfig
from mmpretrain.models.convnets import ARCHITECTURES, ImageName, build_trunk, load_network
from mmpretrain.models.raft import FlowConfig, Raft, check_frames
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.models.towers.frames import FramesTowerConfig
from mmpretrain.models.towers.hf_auto import HFAutoTowerConfig
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.models.towers.torchvision import TorchvisionTowerConfig
from mmpretrain.objectives.base import TowerFacts

VideoTowerUnion = Annotated[
    NativeTowerConfig | FramesTowerConfig | HFAutoTowerConfig | TorchvisionTowerConfig, Field(discriminator="kind")
]


class TwoStreamTowerConfig(TowerConfig):
    """A video tower, and a residual network over optical flow beside it.

    Motions are those between neighbouring frames of the clip: set data.codecs.video.frame_rate, so that they are near.
    """

    kind: Literal["two_stream"] = "two_stream"
    rgb: VideoTowerUnion
    """The tower that reads the frames; its width is that of the tokens."""
    flow: Annotated[FlowConfig, Field(discriminator="kind")] = LucasKanadeConfig()
    """How motion is computed."""
    flow_network: ImageName = "resnet18"
    """Architecture that reads stacks of motions."""
    flow_weights: str | None = None
    """A local .safetensors or .pth file of such a network with 2 flow_frames input channels; null: start fresh."""
    flow_frames: int = Field(10, gt=0)
    """Motions of a stack (L), each two channels; a clip of T frames has (T - 1) / L stacks, rounded down."""
    longest_motion: float = Field(20.0, gt=0)
    """Pixels per frame that become 1; longer motions are cut to them."""
    subtract_mean: bool = True
    """Take the mean motion off each frame's, which cancels much of a camera's."""
    join: Literal["tokens", "late"] = "tokens"
    """tokens: those of both streams side by side; late: one token of each stream, its pooled vector."""

    def check(self, modality: str) -> None:
        if modality != "video":
            raise ValueError(f"a tower of kind two_stream reads videos, not {modality!r}; name it video")
        self.rgb.check("video")
        if isinstance(self.rgb, NativeTowerConfig) and self.rgb.patch_dropout != 0.0:
            raise ValueError("patch_dropout of the rgb tower inside a tower of kind two_stream is not done; remove it")

    @property
    def last_phase(self) -> int:
        return self.rgb.last_phase

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        return self.model_copy(update={"rgb": self.rgb.resolve("video", tokenizer)})

    def reads_elsewhere(self, modality: str) -> bool:
        return self.rgb.reads_elsewhere("video")

    def input_field(self, modality: str) -> FieldSpec:
        return self.rgb.input_field("video")

    def build(self, modality: str) -> "TwoStreamTower":
        return TwoStreamTower(self)


class TwoStreamTower(Tower):
    """RGB tower, motions, the network over them, and a marker for the tokens of each stream."""

    def __init__(self, config: TwoStreamTowerConfig) -> None:
        super().__init__()
        self.config = config
        frames, _, size, _ = config.input_field("video").shape
        self.stacks = (frames - 1) // config.flow_frames
        if not self.stacks:
            raise ConfigError(
                f"a clip of {frames} frames has no stack of {config.flow_frames} motions; set flow_frames of the video "
                f"tower to {frames - 1} or less, or give it more frames"
            )
        check_frames(config.flow, size)
        self.rgb = config.rgb.build("video")
        self.flow = config.flow.build()
        self.flow_trunk = build_trunk(
            config.flow_network, trained=config.flow_weights is not None, channels=2 * config.flow_frames
        )
        network, seen = ARCHITECTURES[config.flow_network], self.rgb.facts()
        self.rgb_adapter = Adapter(seen.width, seen.width)
        self.flow_adapter = Adapter(network.width, seen.width)
        moved = self.stacks * math.ceil(size / network.strides[0]) ** 2
        self._facts = (
            TowerFacts(seen.width, seen.num_tokens + moved, seen.num_prefix)
            if config.join == "tokens"
            else TowerFacts(seen.width, num_tokens=2, num_prefix=0)
        )

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError(
                "a tower of kind two_stream cannot leave tubes out; masked autoencoding needs kind native"
            )
        seen = self.rgb(inputs)
        places = self.flow_trunk(self.motions(inputs).flatten(0, 1))
        moved = self.flow_adapter(places.unflatten(0, (inputs.shape[0], -1)).flatten(1, 2))
        pooled = torch.stack([self.rgb_adapter(seen["pooled"].unsqueeze(1)).squeeze(1), moved.mean(dim=1)], dim=1)
        if self.config.join == "late":
            return {"tokens": pooled, "pooled": pooled.mean(dim=1)}
        tokens = torch.cat([self.rgb_adapter(seen["tokens"]), moved], dim=1)
        return {"tokens": tokens, "pooled": pooled.mean(dim=1)}

    def motions(self, clips: Tensor) -> Tensor:
        """Stacks of motions between -1 and 1, each to the right and then down, fp32 [B, K, 2 L, S, S]."""
        config = self.config
        used = self.stacks * config.flow_frames
        begin = (clips.shape[1] - 1 - used) // 2
        flow: Tensor = self.flow(clips[:, begin : begin + used + 1])
        if config.subtract_mean:
            flow = flow - flow.mean(dim=(-2, -1), keepdim=True)
        flow = (flow / config.longest_motion).clamp(-1, 1)
        stacked: Tensor = flow.flatten(1, 2).unflatten(1, (self.stacks, -1))  # type: ignore[no-untyped-call]
        return stacked

    def facts(self) -> TowerFacts:
        return self._facts

    def blocks(self) -> Sequence[nn.Module]:
        """Those of both streams, by their height in their own."""
        streams = (self.rgb.blocks(), self.flow_trunk.blocks())
        ranked = [(place / len(stream), block) for stream in streams for place, block in enumerate(stream, 1)]
        return [block for _, block in sorted(ranked, key=lambda pair: pair[0])]

    def load_pretrained(self) -> None:
        self.rgb.load_pretrained()
        if isinstance(self.flow, Raft):
            self.flow.load_pretrained()
        if self.config.flow_weights is not None:
            load_network(self.flow_trunk, self.config.flow_network, self.config.flow_weights)
