"""The optimizer: AdamW over two parameter groups, with the guard that DeepSpeed gives only from ZeRO stage 1 on.

Enter: a model and its optimizer settings. Leave: an optimizer for `deepspeed.initialize`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import overload

import torch
from torch import Tensor, nn

from mmpretrain.config_engine import OptimizerConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, shares: Mapping[str, float] | None = None
) -> list[dict[str, object]]:
    """Split trainable parameters: matrices decay; biases, norms, scales and other vectors do not (CLIP, sec. 2.5).

    `shares` names the parameters that learn at a share of the learning rate; each group says its own as "lr_share".
    """
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = 1.0 if shares is None else shares.get(name, 1.0)
            grouped.setdefault((share, _matrix_like(parameter)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_share": share}
        for (share, decays), parameters in sorted(grouped.items(), key=lambda item: item[0], reverse=True)
    ]


def _matrix_like(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2


class GuardedAdamW(torch.optim.AdamW):
    """AdamW for replicated training (stage 0): measures and clips the gradient norm, and leaves the weights alone when
    it is not finite. Gradients are already averaged over ranks, so every rank decides alike.

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
    """AdamW, fused where every parameter can be; clipping is the engine's from stage 1 on."""
    groups = parameter_groups(model, config.weight_decay, shares)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if zero_stage == 0:
        return GuardedAdamW(groups, config.clip_grad_norm, **settings)
    return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
