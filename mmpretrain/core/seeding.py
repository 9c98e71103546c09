"""Randomness as a function of (seed, position), never of a worker's or a rank's history.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 12) mixes 64-bit keys; NumPy's Philox turns a key into a stream.
"""

import hashlib
import zlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray

_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """The SplitMix64 finaliser: a bijection of 64-bit integers with good avalanche."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(seed: int, *parts: int | str) -> int:
    """A 64-bit key from a seed and any integers or names, order-sensitive."""
    key = mix64(seed & _MASK)
    for part in parts:
        word = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = mix64(key ^ mix64(word & _MASK))
    return key


def row_key(seed: int, position: int) -> int:
    """The random key of the sample at a global position, 63 bits so that it fits int64."""
    return key_of(seed, "row", position) >> 1


def sample_key(key: str) -> int:
    """A number for the sample of this full key, 63 bits so that it fits int64: equal in every row that holds it."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


def generator(key: int) -> np.random.Generator:
    """A NumPy generator that depends on the key alone, that of `Philox(key=key)`."""
    return np.random.Generator(np.random.Philox(_KeyWords(key)))  # type: ignore[arg-type]  # it takes any ISeedSequence


class _KeyWords(ISeedSequence):
    """The two words of a Philox key. `Philox(key=key)` takes them too, but asks the system for entropy first, which
    costs three times the rest."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint64]:
        """The words as they are."""
        return np.array([self._key, 0], np.uint64)
