"""Samples read one after another and decoded by threads ahead of the model, in their order.

Enter: inputs, the numbers of samples, what to do with each one's members. Leave: its results, or why there are none.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmpretrain.core.errors import SampleError
from mmpretrain.inference.inputs import Name, SampleInputs

ResultT = TypeVar("ResultT")
AHEAD = 32
"""Samples that wait decoded, per thread."""


@dataclass(frozen=True)
class Decoded(Generic[ResultT]):
    """What became of one sample."""

    name: Name
    result: ResultT | None
    reason: str | None = None
    """Why it could not be used."""


@dataclass(frozen=True)
class Broken:
    """A sample that could not be used, as it is listed."""

    key: str
    path: str
    reason: str


def decode_all(
    inputs: SampleInputs, numbers: Sequence[int], decode: Callable[[Mapping[str, bytes]], ResultT], threads: int
) -> Iterator[Decoded[ResultT]]:
    """Each sample once, in order; the files are read here, so that only decoding is shared among threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Name, Future[ResultT] | SampleError]] = deque()
        for number in numbers:
            waiting.append((inputs.name(number), _submit(pool, inputs, number, decode)))
            if len(waiting) >= AHEAD * threads:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _submit(
    pool: ThreadPoolExecutor, inputs: SampleInputs, number: int, decode: Callable[[Mapping[str, bytes]], ResultT]
) -> Future[ResultT] | SampleError:
    try:
        return pool.submit(decode, inputs.read(number))
    except SampleError as error:
        return error


def _finished(name: Name, outcome: Future[ResultT] | SampleError) -> Decoded[ResultT]:
    try:
        if isinstance(outcome, SampleError):
            raise outcome
        return Decoded(name, outcome.result())
    except SampleError as error:
        return Decoded(name, None, str(error))
