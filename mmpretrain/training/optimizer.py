"""The optimizer: AdamW, Muon for hidden matrices if asked, and the guard that DeepSpeed gives from ZeRO stage 1 on.

Enter: a model and its optimizer settings. Leave: an optimizer for `deepspeed.initialize`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import overload

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpretrain.config_engine import OptimizerConfig
from mmpretrain.layers.blocks import CheckpointedBlock
from mmpretrain.training.muon import MOMENTUM, MuonAdamW


def parameter_groups(
    model: nn.Module, weight_decay: float, shares: Mapping[str, float] | None = None, muon: bool = False
) -> list[dict[str, object]]:
    """Split trainable parameters: matrices decay; biases, norms, scales and other vectors do not (CLIP, sec. 2.5).

    `shares` names the parameters that learn at a share of the learning rate; each group says its own as "lr_share".
    `muon`: hidden matrices are groups of their own, which say so as "orthogonal".
    """
    hidden = {id(matrix) for matrix in hidden_matrices(model)} if muon else set[int]()
    grouped: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = 1.0 if shares is None else shares.get(name, 1.0)
            kind = (share, id(parameter) in hidden, _matrix_like(parameter))
            grouped.setdefault(kind, []).append(parameter)
    return [
        {"params": own, "weight_decay": weight_decay * decays, "lr_share": share, "orthogonal": orthogonal}
        for (share, orthogonal, decays), own in sorted(grouped.items(), key=lambda item: item[0], reverse=True)
    ]


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The weights of the linear layers in transformer blocks: no embedding, projection, head or scale."""
    blocks = [m for m in model.modules() if isinstance(m, CheckpointedBlock | GradientCheckpointingLayer)]
    linear = {layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    return [layer.weight for layer in linear if _matrix_like(layer.weight)]


def _matrix_like(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2


class GuardedAdamW(MuonAdamW):
    """The optimizer for replicated training (stage 0): measures and clips the gradient norm, and leaves the weights
    alone when it is not finite. Gradients are already averaged over ranks, so every rank decides alike.

    `overflow` and `_global_grad_norm` are where the DeepSpeed engine looks for what ZeRO optimizers report.
    """

    def __init__(self, groups: list[dict[str, object]], clip_grad_norm: float, **settings: object) -> None:
        super().__init__(groups, **settings)  # type: ignore[arg-type]
        self.clip_grad_norm = clip_grad_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is None, "closures are not used here"
        for unused in (p for p in self._parameters() if p.grad is None):
            unused.grad = torch.zeros_like(unused)  # as from stage 1 on: its gradient is zero, its decay is not
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not torch.isfinite(norm).item()
        if self.overflow:
            return None
        if self.clip_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters(), self.clip_grad_norm, norm)
        super().step()
        return None

    def _parameters(self) -> Iterable[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, zero_stage: int, shares: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW is fused; clipping is the engine's from stage 1 on."""
    groups = parameter_groups(model, config.weight_decay, shares, config.kind == "muon")
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    momentum = MOMENTUM if config.momentum is None else config.momentum
    if zero_stage == 0:
        return GuardedAdamW(groups, config.clip_grad_norm, momentum=momentum, **settings)
    if config.kind == "muon":
        return MuonAdamW(groups, momentum, **settings)
    return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
