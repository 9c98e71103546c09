"""Initialisation by the scheme of OpenAI's CLIP (Radford et al. 2021, `initialize_parameters`).

Every layer here knows its own initialisation (`reset_parameters`), so that a part that is missing from a checkpoint
can be initialised alone.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import init

from mmpretrain.layers import float8, products

WORD_STD = 0.02
TEXT_POSITION_STD = 0.01


@runtime_checkable
class Resettable(Protocol):
    """A module that can initialise its own parameters and buffers."""

    def reset_parameters(self) -> None: ...


@dataclass(frozen=True)
class BlockScales:
    """Standard deviations for the linear layers of a pre-norm transformer of this width and depth."""

    width: int
    depth: int

    @property
    def attention(self) -> float:
        return float(self.width**-0.5)

    @property
    def residual(self) -> float:
        """For layers that write into the residual stream: shrinks with the number of writes."""
        return float(self.width**-0.5 * (2 * self.depth) ** -0.5)

    @property
    def hidden(self) -> float:
        return float((2 * self.width) ** -0.5)


class Linear(nn.Linear):
    """A linear layer with normal weights of a given standard deviation and zero bias."""

    float8 = False
    """Whether its products are of 8-bit floats while it trains."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = True) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        multiply = float8.linear if self.float8 and self.training else products.linear
        return multiply(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            init.zeros_(self.bias)
