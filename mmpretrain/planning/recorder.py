"""What a computation takes, recorded while it runs: operations, memory alive at once, collectives.

Enter: nothing; every tensor operation that runs under the recorder, on tensors with or without storage. Leave: work by
kind, bytes alive now and at the peak, collectives. Bytes that grow with the rows of the batch are told from those that
do not, such as copies of weights in half precision. Refuses nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten
Kind = Literal["gemm", "attention", "memory"]


def _added_product(_: object, first: Any, second: Any, *args: object, **kwargs: object) -> int:
    """FLOPs of an addmm in place, by shapes as PyTorch's own formulas are."""
    return int(2 * first[0] * first[1] * second[1])


def _attention(query: Any, key: Any, value: Any, *args: object, **kwargs: object) -> int:
    return int(sdpa_flop(query, key, value))


def _attention_backward(_: object, query: Any, key: Any, value: Any, *args: object, **kwargs: object) -> int:
    """Twice the forward, as for any product; scores that a kernel computes again are not counted."""
    return 2 * int(sdpa_flop(query, key, value))


_BY_SHAPES: dict[object, Callable[..., int]] = {
    aten.addmm_: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOPs of what `torch.utils.flop_counter` has no formula for."""
_QUESTIONS = (torch.ops.prim.device.default, aten.is_pinned.default)
"""Asked of a tensor, with no work behind it."""
_NO_TRAFFIC = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}


class Operation(NamedTuple):
    """One kernel: what it computes, the memory it reads and writes, and whether its result is of half precision."""

    kind: Kind
    flops: int
    bytes: int
    half: bool


class Collective(NamedTuple):
    """One message between all ranks; `bytes` counts the whole of it on one rank (all ranks' parts of a gather)."""

    kind: str
    bytes: int


class Size(NamedTuple):
    """Bytes that grow with the rows of the batch, and those that do not."""

    rows: float = 0
    fixed: float = 0

    @property
    def total(self) -> float:
        return self.rows + self.fixed

    def times(self, factor: float) -> Size:
        """The same for so many times the rows."""
        return Size(self.rows * factor, self.fixed)


class Moment(NamedTuple):
    """A part of the time, from one gradient of a weight to the next."""

    live: Size
    """Most that was alive at once, gradients of weights not among it."""
    gradients: int
    """Bytes of such gradients that were there."""


class Work(Counter[Operation]):
    """How often each operation runs."""

    @property
    def flops(self) -> int:
        return sum(operation.flops * count for operation, count in self.items())


@dataclass
class _Block:
    bytes: int
    by_rows: bool
    gradient: bool = False


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs while it is entered; may be entered several times."""

    def __init__(self, weights: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self.collectives: Counter[Collective] = Counter()
        self._peak, self._gradients = Size(), 0
        self._moments: list[Moment] = []
        self._live = {True: 0, False: 0}
        self._blocks: dict[int, tuple[weakref.ref[Any], _Block]] = {}
        self._outside = {id(t.untyped_storage()): (t.untyped_storage(), False) for t in weights}
        self._outside |= {id(t.untyped_storage()): (t.untyped_storage(), True) for t in inputs}

    @property
    def live(self) -> Size:
        """Alive now, of what was made under the recorder; gradients of weights not among it."""
        return Size(self._live[True], self._live[False])

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The whole time so far."""
        return (*self._moments, Moment(self._peak, self._gradients))

    def take_work(self) -> Work:
        """The work so far; from now on it is counted anew."""
        work, self.work = self.work, Work()
        return work

    def mark_gradient(self, weight: Tensor) -> None:
        """Count the gradient of a weight as one; a hook for when it is ready."""
        assert weight.grad is not None, "called when the gradient is ready"
        self._moments.append(Moment(self._peak, self._gradients))
        self._peak = Size()
        known = self._blocks.get(id(weight.grad.untyped_storage()))
        if known is not None and not known[1].gradient:
            block = known[1]
            self._live[block.by_rows] -= block.bytes
            self._gradients += block.bytes
            block.gradient = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        result = func(*_without_choice(func, args), **kwargs)
        given, made = list(_tensors((args, kwargs))), list(_tensors(result))
        by_rows = any(self._depends_on_rows(tensor) for tensor in given)
        for tensor in made:
            self._hold(tensor, by_rows)
        if self._live[True] + self._live[False] > self._peak.total:
            self._peak = self.live
        if func.namespace == "c10d":
            self.collectives[Collective(_collective(func), max(map(_bytes, given), default=0))] += 1
        elif made and not func.is_view and func._overloadpacket not in _NO_TRAFFIC:
            self.work[_operation(func, args, kwargs, result, given, made)] += 1
        return result

    def _depends_on_rows(self, tensor: Tensor) -> bool:
        key = id(tensor.untyped_storage())
        if key in self._blocks:
            return self._blocks[key][1].by_rows
        return key in self._outside and self._outside[key][1]

    def _hold(self, tensor: Tensor, by_rows: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._blocks or key in self._outside:
            return
        self._blocks[key] = (weakref.ref(storage, lambda _: self._free(key)), _Block(storage.nbytes(), by_rows))
        self._live[by_rows] += storage.nbytes()

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)[1]
        if block.gradient:
            self._gradients -= block.bytes
        else:
            self._live[block.by_rows] -= block.bytes


def _without_choice(func: Any, args: Any) -> Any:
    """Rows that are chosen by a mask, whose values nobody knows, count as if all were chosen."""
    if func is not aten.index.Tensor:
        return args
    numbers = [
        torch.zeros(index.shape[0], dtype=torch.int64) if index is not None and index.dtype == torch.bool else index
        for index in args[1]
    ]
    return (args[0], numbers)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Of the values, or of the memory behind them where they are repeated."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _collective(func: Any) -> str:
    name: str = func._overloadpacket.__name__.strip("_")
    plain = {"allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter", "allreduce": "all_reduce"}
    return plain.get(name, name)


def _operation(func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]) -> Operation:
    packet = func._overloadpacket
    flops = 0
    if packet in _BY_SHAPES:
        flops = _BY_SHAPES[packet](*(arg.shape if isinstance(arg, Tensor) else arg for arg in args))
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
    kind: Kind = "memory" if not flops else "attention" if "attention" in packet.__name__ else "gemm"
    return Operation(kind, flops, sum(map(_bytes, given)) + sum(map(_bytes, made)), made[0].element_size() == 2)
