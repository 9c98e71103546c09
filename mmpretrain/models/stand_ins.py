"""Stand-ins for a model's weights and for a batch, with shapes and no contents.

Enter: a model on the meta device, the fields of a batch. Leave: fake tensors of the processor, which computations take
as they take real ones. Refuses nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpretrain.core.types import FieldSpec, TensorDict


def make_fake(model: nn.Module) -> None:
    """Put fake tensors in place of meta ones; run it under a `FakeTensorMode`. Ties between weights are kept."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                module._parameters[name] = made.setdefault(id(weight), fake)  # type: ignore[assignment]
        for held in (module._buffers, vars(module)):  # VideoMAE's positions are an attribute that is neither
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    held[name] = made.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype))


def make_batch(fields: Mapping[str, FieldSpec], rows: int) -> TensorDict:
    """A micro-batch as the loader makes it; run it under a `FakeTensorMode`."""
    facts = {name: FieldSpec((), "int64") for name in ("position", "draw", "sample")}
    return {
        name: torch.empty((rows, *spec.shape), dtype=getattr(torch, spec.dtype))
        for name, spec in {**fields, **facts}.items()
    }
