"""Which sample is the n-th draw from a source: arithmetic alone, so that any position is found at once.

Enter: draw numbers and the number of samples. Leave: sample numbers in the order of the shards, then (shard, ordinal).
Refuses a source without samples.

An epoch permutes chunks of neighbouring samples, then the samples inside windows of many chunks: each batch mixes
hundreds of places, yet a cold store is read in ranges. Both permutations are keyed Feistel networks over exactly as
many bits as needed, walked until they land inside [0, size) (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002): no table, the same cost at any size.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmpretrain.core.errors import DataError

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

CHUNK_SAMPLES = 256
"""Neighbouring samples that stay in one window: what one range read fetches."""
WINDOW_CHUNKS = 256
"""Chunks whose samples are shuffled together."""

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_numbers(
    draws: ArrayLike,
    num_samples: int,
    key: int,
    chunk_samples: int = CHUNK_SAMPLES,
    window_chunks: int = WINDOW_CHUNKS,
) -> Int64s:
    """The sample number in [0, num_samples) of each draw; every run of num_samples draws from a multiple of it is
    an epoch and holds each sample once."""
    if num_samples <= 0:
        raise DataError("a source has no samples; check that its shards hold what the codecs read")
    epochs, places = np.divmod(np.atleast_1d(np.asarray(draws, dtype=np.int64)), num_samples)
    epoch_keys = mix64(np.uint64(key) ^ mix64(epochs.astype(np.uint64)))

    # Chunks stand in slots. The last chunk may be short; it has a slot of its own choice, the others are permuted.
    full_chunks, tail = divmod(num_samples, chunk_samples)
    num_slots = full_chunks + (tail > 0)
    shortage = chunk_samples - tail if tail else 0
    tail_slot = _remainder(mix64(epoch_keys + np.uint64(1)), num_slots) if tail else np.full_like(places, num_slots)

    # Windows share the slots evenly, so that none is small and badly mixed.
    num_windows = max(1, round(num_slots / window_chunks))
    slots = (places + shortage * (places >= tail_slot * chunk_samples + tail)) // chunk_samples
    windows = ((slots + 1) * num_windows - 1) // num_slots
    first, end = windows * num_slots // num_windows, (windows + 1) * num_slots // num_windows
    holds_tail = (first <= tail_slot) & (tail_slot < end)
    start = first * chunk_samples - shortage * (tail_slot < first)
    size = (end - first) * chunk_samples - shortage * holds_tail

    window_keys = mix64(epoch_keys ^ mix64(windows.astype(np.uint64) + np.uint64(2)))
    inside = permute(places - start, size, window_keys)
    inside += shortage * (holds_tail & (inside >= (tail_slot - first) * chunk_samples + tail))
    slots, offsets = first + inside // chunk_samples, inside % chunk_samples
    if not full_chunks:
        return offsets
    others = np.minimum(slots - (slots > tail_slot), full_chunks - 1)
    chunks = permute(others, np.full_like(others, full_chunks), epoch_keys)
    return np.where(slots == tail_slot, full_chunks, chunks) * chunk_samples + offsets


def locate(samples: Int64s, shard_ends: Int64s) -> tuple[Int64s, Int64s]:
    """(shard, ordinal) of each sample number; shard_ends holds the cumulative number of samples of the shards."""
    shards = np.searchsorted(shard_ends, samples, side="right").astype(np.int64)
    begins = np.where(shards > 0, shard_ends[np.maximum(shards, 1) - 1], 0)
    return shards, samples - begins


def substitute(position: int, attempt: int, num_samples: int, key: int) -> int:
    """The sample number that replaces an unusable one at a position; attempts count from 1."""
    words = np.array([position, attempt], dtype=np.uint64)
    mixed = mix64(np.uint64(key) ^ mix64(words[:1] ^ mix64(mix64(words[1:]))))
    return int(_remainder(mixed, num_samples)[0])


def permute(values: Int64s, sizes: Int64s, keys: UInt64s) -> Int64s:
    """Map each value in [0, size) to another one; a bijection for each (size, key). Sizes stay below 2**53."""
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    bounds = sizes.astype(np.uint64)
    out = _feistel(values.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= bounds)
    while outside.size:
        out[outside] = _feistel(out[outside], bits[outside], keys[outside])
        outside = outside[out[outside] >= bounds[outside]]
    return out.astype(np.int64)


def _feistel(values: UInt64s, bits: UInt64s, keys: UInt64s) -> UInt64s:
    """A bijection of [0, 2**bits); the halves differ by at most one bit and are changed in turn."""
    one = np.uint64(1)
    low_bits = bits // np.uint64(2)
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
    high, low = values >> low_bits, values & low_mask
    for number in range(_ROUNDS):
        keys = keys + _GOLDEN
        if number % 2 == 0:
            high = high ^ (mix64(low ^ keys) & high_mask)
        else:
            low = low ^ (mix64(high ^ keys) & low_mask)
    joined: UInt64s = (high << low_bits) | low
    return joined


def mix64(values: UInt64s) -> UInt64s:
    """`core.seeding.mix64` on arrays."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _remainder(values: UInt64s, divisor: int) -> Int64s:
    return (values % np.uint64(divisor)).astype(np.int64)
