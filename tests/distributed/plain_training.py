"""The reference of training: one process, no DeepSpeed, torch's AdamW, the whole batch in one forward."""

from collections.abc import Callable, Sequence

import engine_cases as cases
import torch

from mmpretrain.models.multimodal import MultimodalTransformer


def train_plainly(
    objectives: str,
    steps: int,
    around: Callable[[MultimodalTransformer, int], None] = lambda model, step: None,
    optimizers: Callable[[MultimodalTransformer], Sequence[torch.optim.Optimizer]] | None = None,
) -> tuple[list[float], MultimodalTransformer]:
    """Loss of each step, and the model after them; `around` is called before the first step and after each. Other
    `optimizers` than AdamW may move the weights."""
    config = cases.run_config(objectives, 0, cases.GLOBAL_BATCH)
    model = cases.build_model(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    moving = (optimizers or _adamw)(model)
    losses = []
    around(model, 0)
    for step in range(steps):
        batch = cases.batch(range(step * cases.GLOBAL_BATCH, (step + 1) * cases.GLOBAL_BATCH)).tensors
        counts = model.counts([batch])
        loss = model([batch], {name: 1 / count for name, count in counts.items()})["loss"]
        model.zero_grad()
        loss.backward()
        for unused in (p for p in trained if p.grad is None):
            unused.grad = torch.zeros_like(unused)  # torch would spare it the weight decay as well
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in moving:
            optimizer.step()
        losses.append(loss.item())
        around(model, step + 1)
    return losses, model


def _adamw(model: MultimodalTransformer) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if sum(size > 1 for size in p.shape) >= 2]
    others = [p for p in trained if sum(size > 1 for size in p.shape) < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=cases.LR, betas=(0.9, 0.98), eps=1e-6)]
