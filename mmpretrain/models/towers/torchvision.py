"""A residual network of torchvision as an image tower: the last feature map's places become tokens.

Enter: uint8 [B, 3, S, S]. Leave: tokens [B, (S / 32)^2, D] and their mean. Refused: weights of another shape. Batch
norm never computes batch statistics here, because a row's result would then depend on the rows beside it and no longer
be the same for every number of ranks and micro-batches: with weights it is frozen, without it is group norm.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.layers.pixels import Normalise
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import TowerFacts

_STRIDE = 32
_GROUPS = 32
_NOT_TRUNK = ("avgpool", "fc")


class TorchvisionTowerConfig(TowerConfig):
    """A residual network of torchvision."""

    kind: Literal["torchvision"] = "torchvision"
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Architecture."""
    weights: str | None = None
    """A local .safetensors or .pth file, or the name of published weights (IMAGENET1K_V2); null: start fresh."""
    image_size: int = Field(224, gt=0, multiple_of=_STRIDE)
    """Height and width of the images in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the pixels / 255, per channel."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels / 255, per channel."""

    def check(self, modality: str) -> None:
        if modality != "image":
            raise ValueError(f"a tower of kind torchvision reads images, not {modality!r}; name it image")

    def input_field(self, modality: str) -> FieldSpec:
        return FieldSpec((3, self.image_size, self.image_size), "uint8")

    def build(self, modality: str) -> "TorchvisionTower":
        return TorchvisionTower(self)


class TorchvisionTower(Tower):
    """The network up to its last feature map."""

    def __init__(self, config: TorchvisionTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.mean, config.std)
        self.trunk, self.width = _build_trunk(config.name, frozen=config.weights is not None)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError(
                "a tower of kind torchvision cannot leave patches out; masked autoencoding needs kind native"
            )
        pixels = self.normalise(inputs.movedim(1, -1)).movedim(-1, 1)
        tokens = self.trunk(pixels).flatten(2).transpose(1, 2)
        return {"tokens": tokens, "pooled": tokens.mean(dim=1)}

    def facts(self) -> TowerFacts:
        return TowerFacts(width=self.width, num_tokens=(self.config.image_size // _STRIDE) ** 2, num_prefix=0)

    def blocks(self) -> Sequence[nn.Module]:
        return [module for module in self.trunk.children() if isinstance(module, nn.Sequential)]

    def load_pretrained(self) -> None:
        if self.config.weights is None:
            return
        state = _read_weights(self.config.name, self.config.weights)
        wanted = self.trunk.state_dict()
        wrong = [name for name, tensor in wanted.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            raise ConfigError(
                f"{self.config.weights} holds no weights of a {self.config.name}: {len(wrong)} of {len(wanted)} "
                f"tensors are absent or of another shape, {wrong[0]} first; name the architecture these weights are of"
            )
        self.trunk.load_state_dict({name: state[name] for name in wanted})


def _build_trunk(name: str, frozen: bool) -> tuple[nn.Module, int]:
    """The network without its head, and the channels of its last feature map."""
    from torchvision.models import get_model
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if frozen else partial(nn.GroupNorm, _GROUPS)
    network = get_model(name, weights=None, norm_layer=norm)
    children = OrderedDict((n, child) for n, child in network.named_children() if n not in _NOT_TRUNK)
    return nn.Sequential(children), network.fc.in_features


def _read_weights(name: str, source: str) -> dict[str, Tensor]:
    path = Path(source)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in {".pth", ".pt"}:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    if source not in published.__members__:
        raise ConfigError(
            f"weights {source!r} is neither a .safetensors or .pth file nor one of {', '.join(published.__members__)}"
        )
    downloaded: dict[str, Tensor] = published[source].get_state_dict(progress=False, check_hash=True)
    return downloaded
