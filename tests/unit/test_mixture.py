"""The mixture: exact counts at every prefix, changes in mid-run, one integer of state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import MixtureConfig
from data_pipeline.mixture import integer_shares, lay_out, mixture_of
from mmpretrain.core.config import parse_config
from mmpretrain.core.errors import ConfigError


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
def test_every_prefix_holds_each_source_to_within_one(weights: list[int]) -> None:
    pattern = lay_out(weights)
    positions = np.arange(2 * pattern.num_slots)
    sources, draws = pattern.assign(positions)
    for number, weight in enumerate(weights):
        drawn = sources == number
        assert np.all(np.abs(np.cumsum(drawn) - (positions + 1) * weight / sum(weights)) < 1)
        assert draws[drawn].tolist() == list(range(drawn.sum()))


def test_equal_weights_alternate() -> None:
    sources, draws = mixture_of({"a": 1.0, "b": 1.0}).assign(np.arange(6))
    assert sources.tolist() == [0, 1, 0, 1, 0, 1]
    assert draws.tolist() == [0, 0, 1, 1, 2, 2]


def test_weights_are_read_as_decimals() -> None:
    assert integer_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_shares([0.3333333, 0.3333333, 0.3333333]) == [1, 1, 1]
    assert integer_shares([2e-3, 1e-3, 0.0]) == [2, 1, 0]


def test_every_micro_batch_of_whole_periods_holds_the_same_rows_of_each_source() -> None:
    sources, _ = mixture_of({"a": 0.75, "b": 0.25}).assign(np.arange(800))
    assert {tuple(np.bincount(batch)) for batch in sources.reshape(-1, 8)} == {(6, 2)}


def test_draws_count_on_through_changes_of_weights() -> None:
    mixture = mixture_of({"a": 1.0, "b": 1.0}, [(7, {"b": 1.0}), (10, {"a": 3.0, "b": 1.0})])
    sources, draws = mixture.assign(np.arange(1000))
    assert sources[:7].tolist() == [0, 1, 0, 1, 0, 1, 0] and sources[7:10].tolist() == [1, 1, 1]
    assert np.bincount(sources[10:]).tolist() == [743, 247]
    for number in (0, 1):
        assert draws[sources == number].tolist() == list(range(np.count_nonzero(sources == number)))


def test_any_position_is_found_without_those_before() -> None:
    mixture = mixture_of({"a": 0.7, "b": 0.3}, [(10**9, {"a": 1.0})])
    sources, draws = mixture.assign([10**9 - 1, 10**9, 10**15])
    assert (sources[1:] == 0).all()
    assert draws[1:].tolist() == [7 * 10**8, 7 * 10**8 + 10**15 - 10**9]


def test_weights_that_hardly_ever_repeat_are_refused_with_a_round_suggestion() -> None:
    with pytest.raises(ConfigError, match="repeat only after 1000000 samples.*e.g. to 0.123, 0.877"):
        integer_shares([0.123457, 0.876543])


def test_all_weights_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights of the sources are all 0"):
        integer_shares([0.0, 0.0])


def test_faults_of_a_mixture_are_told_together() -> None:
    text = """
sources:
  a: {shards: [x.tar], weight: 0}
changes:
  - {from_sample: 10, weights: {a: 1}}
  - {from_sample: 5, weights: {b: 1}}
"""
    with pytest.raises(ConfigError) as caught:
        parse_config(MixtureConfig, text, "run.yaml")
    message = str(caught.value)
    assert "weights of the sources are all 0" in message
    assert "no source of this name; sources are a" in message
    assert "5 comes after 10; sort the changes" in message
