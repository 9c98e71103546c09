"""The floating-point operations that training on one row takes, counted on tensors without storage.

Enter: a model on the meta device, the fields of a batch. Leave: FLOPs of a row's way through towers, fusion and heads
and back, by `torch.utils.flop_counter`; what is frozen costs no gradient, and nothing is computed twice. Left out is
what joins rows of different samples: logits of contrastive losses, rows fused anew for matching.
"""

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.core.types import FieldSpec
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.stand_ins import make_batch, make_fake

_ROWS = 2


def training_flops(model: MultimodalTransformer, fields: Mapping[str, FieldSpec]) -> float:
    """FLOPs of one row, forward and backward; a product of two matrices [a, b] and [b, c] counts 2 a b c.

    The model is left with tensors that hold nothing."""
    # attention as plain products, of which the counter knows all
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_fake(model)
        parts = model.train().encode(make_batch(fields, _ROWS))
        learned = [part for part in parts.values() if part.requires_grad]
        if learned:
            torch.autograd.backward(learned, [torch.ones_like(part) for part in learned])
    return float(counter.get_total_flops()) / _ROWS
