"""A copy of a network that follows the trained one slowly and says what that one should learn to tell.

Enter: inputs. Leave: features of its upper blocks, without gradient. The copy never trains; its weights are a moving
average of the network's (Tarvainen and Valpola, arXiv 1703.01780), which whoever holds the optimizer keeps up to date.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.layers.pair_tiles import full_precision


class Layered(nn.Module):
    """A network of blocks over content tokens."""

    def top_layers(self, inputs: Tensor, mask: Tensor | None, number: int) -> list[Tensor]:
        """What the last `number` blocks say of the content tokens, lowest first: [B, L, D] each."""
        raise NotImplementedError


class Teacher(nn.Module):
    """The copy: no parameter of it takes a gradient, and it always runs as in evaluation."""

    def __init__(self, network: Layered) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def targets(self, inputs: Tensor, mask: Tensor | None, layers: int) -> Tensor:
        """The mean over the upper blocks' outputs, each normalised over its width: fp32 [B, L, D] (data2vec)."""
        outputs = [full_precision(output) for output in self.network.top_layers(inputs, mask, layers)]
        return torch.stack([functional.layer_norm(output, output.shape[-1:]) for output in outputs]).mean(0)
