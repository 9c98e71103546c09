"""What of a block's forward is kept for its backward, and what is computed again.

Enter: a policy. Leave: the options with which `torch.utils.checkpoint.checkpoint` follows it. Refuses nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, TypedDict

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

Recompute = Literal["none", "block", "selective"]

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""What costs by the width; norms, nonlinearities and sums cost by the token and take most of the memory."""


class CheckpointOptions(TypedDict, total=False):
    """Arguments of `torch.utils.checkpoint.checkpoint`."""

    use_reentrant: bool
    context_fn: Callable[[], "_Contexts"]
    respect_saved_tensors_hooks: bool


def checkpoint_options(policy: Recompute) -> CheckpointOptions:
    """block: only the inputs are kept; selective: products and attention as well (Korthikanti et al., 2205.05198)."""
    if policy != "selective":
        return {"use_reentrant": False}
    # What is kept must be dropped where a chunk of a cached batch, around the block, is computed again.
    return {"use_reentrant": False, "context_fn": _keep_products, "respect_saved_tensors_hooks": True}


def _policy(context: SelectiveCheckpointContext, operator: object, *inputs: object, **more: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
_keep_products: Callable[[], _Contexts] = partial(create_selective_checkpoint_contexts, _policy)
