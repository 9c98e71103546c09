"""Work over several processes: order, and workers that die."""

import os

import pytest

from data_pipeline.parallel import run_parallel
from mmpretrain.core.errors import ConfigError, DataError


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_stand_in_the_order_of_the_items(workers: int | None) -> None:
    finished: list[int] = []
    assert run_parallel(abs, [-3, -1, -2], workers, "counting", finished.append) == [3, 1, 2]
    assert sorted(finished) == [1, 2, 3]


def test_a_killed_worker_is_told_from_a_fault_of_the_data() -> None:
    with pytest.raises(DataError, match="a worker process was killed, usually for want of memory; use fewer --workers"):
        run_parallel(os._exit, [1, 1], 2, "dying")


def test_no_workers_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers is 0; give at least 1, or leave it out"):
        run_parallel(abs, [1], 0, "counting")
