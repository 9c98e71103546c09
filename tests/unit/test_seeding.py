"""Random streams are NumPy's own for the same key, whichever way they are made."""

import numpy as np
import pytest

from mmpretrain.core.seeding import generator


@pytest.mark.parametrize("key", [0, 1, 0x9E3779B97F4A7C15, (1 << 64) - 1])
def test_a_generator_is_numpys_philox_of_the_key(key: int) -> None:
    ours, numpys = generator(key), np.random.Generator(np.random.Philox(key=key))
    assert np.array_equal(ours.random(7), numpys.random(7))
    assert np.array_equal(ours.integers(1 << 40, size=7), numpys.integers(1 << 40, size=7))
    assert np.array_equal(ours.permutation(9), numpys.permutation(9))
