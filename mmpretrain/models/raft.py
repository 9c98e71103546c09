"""Motion between neighbouring frames by a network that was trained for it: RAFT (Teed and Deng, arXiv 2003.12039).

Enter: uint8 clips and a file of weights. Leave: how far each pixel moves until the next frame. Refused: frames too
small for its pyramid, weights of another network. It is never trained here, so its weights are buffers.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.errors import ConfigError
from mmpretrain.layers.optical_flow import LucasKanadeConfig
from mmpretrain.models.convnets import load_network

SMALLEST = 128
"""Pixels along a side below which its coarsest correlations have no neighbours."""


class RaftConfig(Config):
    """Optical flow by torchvision's small RAFT, of a million weights."""

    kind: Literal["raft"] = "raft"
    weights: str
    """A local .safetensors or .pth file, or the name of published weights (C_T_V2)."""
    updates: int = Field(12, gt=0)
    """Steps by which the motion is refined."""

    def build(self) -> "Raft":
        return Raft(self)


FlowConfig = LucasKanadeConfig | RaftConfig


class Raft(nn.Module):
    """Frames to motions; a row depends on its own frames alone, and no gradient flows."""

    def __init__(self, config: RaftConfig) -> None:
        super().__init__()
        from torchvision.models import get_model  # loads much; only models with such a stream need it

        self.config = config
        self.network: nn.Module = get_model("raft_small", weights=None)
        for module in self.network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Map uint8 [B, T, 3, H, W] to pixels right and down, fp32 [B, T - 1, 2, H, W]."""
        with torch.autocast(clips.device.type, enabled=False):
            frames = clips.float() / 127.5 - 1
            first, second = (part.flatten(0, 1) for part in (frames[:, :-1], frames[:, 1:]))
            motions: Tensor = self.network(first, second, num_flow_updates=self.config.updates)[-1]
            return motions.unflatten(0, (clips.shape[0], -1))  # type: ignore[no-untyped-call, no-any-return]

    def load_pretrained(self) -> None:
        load_network(self.network, "raft_small", self.config.weights)


def check_frames(config: FlowConfig, size: int) -> None:
    """Refuse frames that a kind of flow cannot read."""
    if isinstance(config, RaftConfig) and (size < SMALLEST or size % 8):
        raise ConfigError(
            f"flow of kind raft reads frames of {SMALLEST} pixels and more in steps of 8, the rgb tower has {size}; "
            "change its image_size, or set flow.kind to lucas_kanade"
        )
