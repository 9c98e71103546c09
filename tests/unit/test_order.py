"""The order of samples: every epoch a permutation, well mixed, local, and the same by any way to compute it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import locate, permute, sample_numbers, substitute
from mmpretrain.core.errors import DataError
from mmpretrain.core.seeding import mix64


def reference_permute(value: int, size: int, key: int) -> int:
    """A Feistel network on Python integers, walked until it lands inside."""
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        high, low = value >> low_bits, value & low_mask
        for number in range(8):
            round_key = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
            if number % 2 == 0:
                high ^= mix64(low ^ round_key) & high_mask
            else:
                low ^= mix64(high ^ round_key) & low_mask
        value = high << low_bits | low
        if value < size:
            return value


def test_a_permutation_equals_a_feistel_network_on_python_integers() -> None:
    for size in (1, 2, 3, 7, 64, 1000, 2**40 + 9):
        values = np.arange(min(size, 50))
        key = mix64(size)
        seen = permute(values, np.full_like(values, size), np.full(len(values), key, np.uint64))
        assert seen.tolist() == [reference_permute(value, size, key) for value in values.tolist()]


@pytest.mark.parametrize(("chunk_samples", "window_chunks"), [(1, 1), (4, 3), (7, 2), (256, 256)])
def test_every_epoch_holds_every_sample_once_at_any_size(chunk_samples: int, window_chunks: int) -> None:
    for num_samples in [*range(1, 70), 255, 256, 257, 1000]:
        numbers = sample_numbers(np.arange(3 * num_samples), num_samples, num_samples, chunk_samples, window_chunks)
        for epoch in numbers.reshape(3, num_samples):
            assert sorted(epoch.tolist()) == list(range(num_samples))


@given(
    num_samples=st.integers(1, 3000),
    key=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
    chunk_samples=st.integers(1, 300),
    window_chunks=st.integers(1, 10),
)
def test_any_epoch_is_a_permutation(
    num_samples: int, key: int, epoch: int, chunk_samples: int, window_chunks: int
) -> None:
    draws = np.arange(num_samples) + epoch * num_samples
    numbers = sample_numbers(draws, num_samples, key, chunk_samples, window_chunks)
    assert len(np.unique(numbers)) == num_samples and numbers.min() == 0 and numbers.max() == num_samples - 1


def test_a_draw_is_the_same_alone_and_among_others() -> None:
    draws = np.array([0, 5, 299_999, 300_000, 10**12])
    together = sample_numbers(draws, 300_000, 3)
    assert [sample_numbers(draw, 300_000, 3).item() for draw in draws] == together.tolist()


def test_epochs_and_keys_give_different_orders() -> None:
    first, second = sample_numbers(np.arange(2000), 1000, 1).reshape(2, 1000)
    other = sample_numbers(np.arange(1000), 1000, 2)
    assert np.mean(first == second) < 0.01 and np.mean(first == other) < 0.01


def test_a_small_set_mixes_as_one_whole() -> None:
    numbers = sample_numbers(np.arange(1000), 1000, 9)
    neighbours = np.abs(np.diff(numbers))
    assert 300 < neighbours.mean() < 370  # two random places of 1000 are 333 apart on average
    assert abs(np.corrcoef(np.arange(1000), numbers)[0, 1]) < 0.1


def test_a_batch_mixes_many_chunks_and_a_window_reads_few() -> None:
    """A million samples are 3907 chunks in 15 windows, the first of 260 chunks."""
    window = sample_numbers(np.arange(260 * 256), 1_000_000, 4) // 256
    assert len(np.unique(window)) == 260
    assert len(np.unique(window[:64])) > 50


def test_no_window_is_small() -> None:
    """65 chunks in windows of 64 would leave a last window of one chunk, whose batches would be neighbours."""
    last_batch = sample_numbers(np.arange(65 * 8 - 16, 65 * 8), 65 * 8, 5, chunk_samples=8, window_chunks=64)
    assert len(np.unique(last_batch // 8)) > 8


def test_a_position_in_a_trillion_samples_needs_no_table() -> None:
    assert 0 <= sample_numbers(10**18, 10**12 + 7, 5).item() < 10**12 + 7


def test_numbers_become_shards_and_ordinals() -> None:
    shards, ordinals = locate(np.array([0, 2, 3, 4, 9]), np.array([3, 4, 10]))
    assert shards.tolist() == [0, 0, 1, 2, 2]
    assert ordinals.tolist() == [0, 2, 0, 0, 5]


def test_substitutes_depend_on_position_and_attempt_and_cover_the_source() -> None:
    seen = {substitute(position, attempt, 50, 1) for position in range(20) for attempt in range(1, 20)}
    assert seen == set(range(50))
    assert substitute(7, 1, 10**9, 1) == substitute(7, 1, 10**9, 1) != substitute(7, 2, 10**9, 1)


def test_a_source_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="has no samples; check that its shards"):
        sample_numbers(0, 0, 1)
