"""Batch norm without batch statistics: a row's result never depends on the rows beside it, nor on the number of ranks.

Enter: a network of another library. Leaves: the same network, in which each batch norm uses the statistics it was
trained with, or is group norm where it was not trained. Legend: B rows, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_GROUPS = 32
"""Of group norm (Wu and He, arXiv 1803.08494); fewer where these do not divide the channels, or into single ones, which
would be zero on a map of one place."""

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class FixedStatisticsNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias per channel; mean and variance are stored and never move."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels, device=device))
        self.bias = nn.Parameter(torch.empty(channels, device=device))
        self.register_buffer("running_mean", torch.empty(channels, device=device))
        self.register_buffer("running_var", torch.empty(channels, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, values: Tensor) -> Tensor:
        """Normalise [B, C, ...]."""
        return F.batch_norm(values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def replace_batch_norm(network: nn.Module, trained: bool) -> None:
    """Put a norm without batch statistics in the place of every batch norm, under the same name.

    `trained`: it holds, or will be given, statistics worth keeping.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                parent.register_module(name, _with_statistics(child) if trained else _without_statistics(child))


def _with_statistics(norm: _BatchNorm) -> FixedStatisticsNorm:
    fixed = FixedStatisticsNorm(norm.num_features, norm.eps, norm.weight.device)
    stored = norm.state_dict()
    fixed.load_state_dict({name: stored[name] for name in fixed.state_dict()})
    return fixed


def _without_statistics(norm: _BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    most = max(1, min(_MOST_GROUPS, channels // 2))
    groups = next(number for number in range(most, 0, -1) if channels % number == 0)
    return nn.GroupNorm(groups, channels, device=norm.weight.device)
