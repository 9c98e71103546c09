"""The optimizer: AdamW over two parameter groups, with the guard that DeepSpeed gives only from ZeRO stage 1 on.

Enter: a model and its optimizer settings. Leave: an optimizer for `deepspeed.initialize`.
"""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn

from mmpretrain.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters: matrices decay; biases, norms, scales and other vectors do not (CLIP, sec. 2.5)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if _matrix_like(p)]
    vectors = [p for p in trainable if not _matrix_like(p)]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


def build_optimizer(model: nn.Module, config: OptimizerConfig, zero_stage: int) -> torch.optim.Optimizer:
    """AdamW, fused where every parameter can be; clipping is the engine's from stage 1 on."""
    groups = parameter_groups(model, config.weight_decay)
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if zero_stage == 0:
        return GuardedAdamW(groups, config.clip_grad_norm, **settings)
    return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
