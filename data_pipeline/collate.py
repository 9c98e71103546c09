"""Decoded rows into the few large tensors of a batch, each row copied once, straight to its place.

Enter: the fields of the codecs, then one decoded row after another. Leave: `TensorDict`. Refused: a codec that returns
other fields, shapes or dtypes than it declares, which is a bug of the codec.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mmpretrain.core.types import Array, Codec, FieldSpec, TensorDict


class BatchRows:
    """Tensors of a number of rows that are being filled; in a worker process they lie in shared memory at once."""

    def __init__(self, codecs: Mapping[str, Codec], num_rows: int) -> None:
        fields = {name: spec for codec in codecs.values() for name, spec in codec.fields.items()}
        self._tensors = {name: _empty(num_rows, spec) for name, spec in fields.items()}
        self._arrays: dict[str, Array] = {name: tensor.numpy() for name, tensor in self._tensors.items()}

    def put(self, row: int, decoded: Mapping[str, Array]) -> None:
        """Copy one decoded sample to its row."""
        assert decoded.keys() == self._arrays.keys(), f"decoded {sorted(decoded)}, declared {sorted(self._arrays)}"
        for name, value in decoded.items():
            target = self._arrays[name][row, ...]
            assert (value.shape, value.dtype) == (target.shape, target.dtype), f"{name}: {value.shape} {value.dtype}"
            np.copyto(target, value)

    def tensors(self, num_rows: int) -> TensorDict:
        """The first rows."""
        return {name: tensor[:num_rows] for name, tensor in self._tensors.items()}


def _empty(num_rows: int, spec: FieldSpec) -> torch.Tensor:
    dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
    tensor = torch.empty((num_rows, *spec.shape), dtype=dtype)
    if get_worker_info() is not None:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor
