"""A number that tells what a step consumed, added up over rows, workers and ranks in any order.

Enter: positions and the samples that were read for them. Leave: the sum of one 64-bit mark a row, mod 2**64. Two steps
have the same digest only if they put the same samples at the same positions, but for one chance in 2**64.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.order import UInt64s, mix64

MODULUS = 1 << 64


def shard_mark(source: str, shard_name: str) -> int:
    """A number for a shard of a source, by the name that is its own in the run."""
    return int.from_bytes(hashlib.blake2b(f"{source}\0{shard_name}".encode(), digest_size=8).digest())


def row_marks(positions: NDArray[np.int64], shard_marks: UInt64s, ordinals: NDArray[np.int64]) -> UInt64s:
    """[rows] A mark for each sample, told by shard and ordinal, at its position."""
    samples = mix64(shard_marks ^ mix64(ordinals.astype(np.uint64)))
    return mix64(samples ^ mix64(positions.astype(np.uint64)))


def joined(digests: Iterable[int]) -> int:
    """The digest of everything together."""
    return sum(digests) % MODULUS


def halves(digest: int) -> tuple[int, int]:
    """High and low 32 bits, which may be added up as float64 over two million ranks without loss."""
    return digest >> 32, digest & 0xFFFFFFFF


def of_halves(high: float, low: float) -> int:
    """The digest of added halves."""
    return ((int(high) << 32) + int(low)) % MODULUS
