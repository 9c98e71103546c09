"""Which layers multiply in 8-bit floats.

Enter: a model and its device. Leave: the wide linear layers of its own blocks with 8-bit products. Refused: devices
without units for them, and models that have no layer wide enough to gain.
"""

import torch
from torch import nn

from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.layers.blocks import CheckpointedBlock
from mmpretrain.layers.float8 import MULTIPLE
from mmpretrain.layers.initialization import Linear

LEAST_WIDTH = 1024
"""Below, rounding costs what the products save."""
_HOPPER = (9, 0)


def use_float8(model: nn.Module, device: torch.device) -> int:
    """Switch 8-bit products on; returns in how many layers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"
        raise ClusterError(
            f"engine.float8 needs a GPU with 8-bit float units (H100, H200 or newer) and this is {kind}; "
            f"set engine.float8 to false"
        )
    return switch_on(model)


def switch_on(model: nn.Module) -> int:
    """Whatever the device."""
    blocks = [module for module in model.modules() if isinstance(module, CheckpointedBlock)]
    layers = {layer for block in blocks for layer in block.modules() if isinstance(layer, Linear) and _gains(layer)}
    if not layers:
        raise ConfigError(
            f"engine.float8 is for linear layers of {LEAST_WIDTH} and wider and no block of the model has one; "
            f"set engine.float8 to false"
        )
    for layer in layers:
        layer.float8 = True
    return len(layers)


def _gains(layer: Linear) -> bool:
    sizes = layer.in_features, layer.out_features
    return min(sizes) >= LEAST_WIDTH and not any(size % MULTIPLE for size in sizes)
