"""The floating-point operations that training on one row takes, counted on tensors without storage.

Enter: a model on the meta device, the fields of a batch. Leave: FLOPs of a row's way through towers, fusion and heads
and back, by `torch.utils.flop_counter`; what is frozen costs no gradient, and nothing is computed twice. Left out is
what joins rows of different samples: logits of contrastive losses, rows fused anew for matching.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.models.multimodal import MultimodalTransformer

_ROWS = 2
_ROW_FACTS = {name: FieldSpec((), "int64") for name in ("position", "draw", "sample")}


def training_flops(model: MultimodalTransformer, fields: Mapping[str, FieldSpec]) -> float:
    """FLOPs of one row, forward and backward; a product of two matrices [a, b] and [b, c] counts 2 a b c.

    The model is left with tensors that hold nothing."""
    # attention as plain products, of which the counter knows all
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _put_fakes(model)
        parts = model.train().encode(_batch({**fields, **_ROW_FACTS}))
        learned = [part for part in parts.values() if part.requires_grad]
        if learned:
            torch.autograd.backward(learned, [torch.ones_like(part) for part in learned])
    return float(counter.get_total_flops()) / _ROWS


def _put_fakes(model: nn.Module) -> None:
    """Fake tensors of the processor in place of meta ones, which have no autocast; weights that were tied stay so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            setattr(module, name, made.setdefault(id(weight), fake))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype)))


def _batch(fields: Mapping[str, FieldSpec]) -> TensorDict:
    return {name: torch.empty((_ROWS, *spec.shape), dtype=getattr(torch, spec.dtype)) for name, spec in fields.items()}
