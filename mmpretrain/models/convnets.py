"""Networks of torchvision without their heads: images or videos in, the last feature map out.

Enter: an architecture's name, and a file of weights. Leave: a trunk that is checkpointed by stages and has no batch
statistics, dropout or stochastic depth. Refused: weights of another shape. Nothing is downloaded unless published
weights are asked for by name. Legend: B rows, T frames, S pixels, C channels of the last map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.layers.batch_norm import replace_batch_norm
from mmpretrain.layers.blocks import CheckpointedChain
from mmpretrain.models.foreign_weights import UNREADABLE, first_line

ImageName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
VideoName = Literal["r3d_18", "r2plus1d_18", "s3d", "swin3d_t"]
Statistics = tuple[float, float, float]

_HEADS = ("avgpool", "fc", "classifier", "head")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


@dataclass(frozen=True)
class Architecture:
    """What must be known of a network to read its last feature map."""

    width: int
    """C."""
    strides: tuple[int, ...]
    """Input places to one of the map, along time (videos) and space."""
    statistics: tuple[Statistics, Statistics]
    """Mean and standard deviation of the pixels / 255 that the published weights were trained with."""
    channels_last: bool = False
    """The map is [B, T, S, S, C]."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet18": Architecture(512, (32,), _IMAGENET),
    "resnet34": Architecture(512, (32,), _IMAGENET),
    "resnet50": Architecture(2048, (32,), _IMAGENET),
    "resnet101": Architecture(2048, (32,), _IMAGENET),
    "r3d_18": Architecture(512, (8, 16), _KINETICS),
    "r2plus1d_18": Architecture(512, (8, 16), _KINETICS),
    "s3d": Architecture(1024, (8, 32), _KINETICS),
    "swin3d_t": Architecture(768, (2, 32), _IMAGENET, channels_last=True),
}
assert set(ARCHITECTURES) == {*get_args(ImageName), *get_args(VideoName)}


class Trunk(CheckpointedChain):
    """The network up to its last feature map."""

    def __init__(self, name: str, links: Mapping[str, nn.Module]) -> None:
        super().__init__(links)
        self.channels_last = ARCHITECTURES[name].channels_last

    def blocks(self) -> list[nn.Module]:
        """The stages in the order in which values pass them."""
        features = self._modules.get("features")
        if features is None:
            return [link for link in self.children() if type(link) is nn.Sequential]
        return [link for link in features.children() if next(link.parameters(), None) is not None]

    def forward(self, values: Tensor) -> Tensor:  # type: ignore[override]
        """Map fp32 [B, channels, (T,) S, S] to the places of the last map, [B, L, C]; time runs slowest."""
        features = super().forward(values)
        return features.flatten(1, -2) if self.channels_last else features.flatten(2).transpose(1, 2)


def build_trunk(name: str, trained: bool, channels: int = 3) -> Trunk:
    """A fresh network; `trained`: weights will be loaded, so its batch norms keep their statistics.

    `channels` other than 3 are those of a residual network over something else than colours.
    """
    from torchvision.models import get_model  # loads much; only models with such a tower need it

    network: nn.Module = get_model(name, weights=None)
    if channels != 3:
        network.register_module("conv1", _first_convolution(channels))
    replace_batch_norm(network, trained)
    _remove_chance(network)
    children = {n: child for n, child in network.named_children() if n not in _HEADS}
    links = {n: CheckpointedChain(dict(c.named_children())) if n == "features" else c for n, c in children.items()}
    return Trunk(name, links)


def load_network(network: nn.Module, name: str, source: str) -> None:
    """Fill a network, or its trunk, from a local .safetensors or .pth file of the whole, or from published weights."""
    state = _read_weights(name, source)
    wanted = network.state_dict()
    wrong = [key for key, tensor in wanted.items() if key not in state or state[key].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"{source} holds no weights of a {name}: {len(wrong)} of {len(wanted)} tensors are absent or of another "
            f"shape, {wrong[0]} first; name the architecture these weights are of"
        )
    network.load_state_dict({key: state[key] for key in wanted})


def _first_convolution(channels: int) -> nn.Conv2d:
    first = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    return first


def _remove_chance(network: nn.Module) -> None:
    """What is random about a row follows from its key alone, so dropout and stochastic depth never act."""
    from torchvision.ops import StochasticDepth

    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0


def _read_weights(name: str, source: str) -> dict[str, Tensor]:
    state = read_state(Path(source))
    if state is not None:
        return state
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    if source not in published.__members__:
        raise ConfigError(
            f"weights {source!r} is neither a .safetensors or .pth file nor one of {', '.join(published.__members__)}"
        )
    downloaded: dict[str, Tensor] = published[source].get_state_dict(progress=False, check_hash=True)
    return downloaded


def read_state(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of weights; None for a name that is none."""
    if path.suffix not in {".safetensors", ".pth", ".pt"}:
        return None
    if not path.is_file():
        raise ConfigError(f"weights {str(path)!r} is no file; give the path of a .safetensors or .pth file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UNREADABLE as error:
        raise ConfigError(f"weights {str(path)!r} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"weights {str(path)!r} are no tensors by name; give the state dict alone")
    return state
