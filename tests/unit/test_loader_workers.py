"""Workers of the loader: the same batches, errors that reach the user, and an end that is told once."""

import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from test_loader import flat, load, shards

from data_pipeline.loader import MicroBatches, Wire
from mmpretrain.core.errors import DataError

__all__ = ["shards"]  # the fixture


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(shards: Path) -> None:
    state = torch.get_rng_state()
    rows = flat(load(shards, micro=4, workers=2))
    assert rows == flat(load(shards, micro=4, workers=0))
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random stream is not touched


@pytest.mark.slow
def test_errors_of_a_worker_reach_the_user_without_a_traceback(shards: Path) -> None:
    loader = load(shards, workers=1)
    (shards / "1.tar").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*1.tar[^\n]*$"):
        list(loader)


class LostOnTheWay(MicroBatches):
    """Micro-batches that cannot be fetched from a worker, as when it ends between a word of one and the one itself."""

    def __getitem__(self, number: int) -> Wire:
        return lost_on_the_way, (), (), 0  # type: ignore[return-value]


class _LostOnTheWay:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return reset_connection, ()


lost_on_the_way = _LostOnTheWay()


def reset_connection() -> None:
    raise ConnectionResetError


@pytest.mark.slow
def test_a_worker_that_ends_while_it_hands_over_is_told_once(shards: Path) -> None:
    whole = load(shards, workers=1)
    loader = replace(whole, micro_batches=LostOnTheWay(whole.micro_batches.rows, whole.micro_batches.plan, 6))
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker ended while it handed over a batch") as told:
            next(iter(loader))
        (worker,) = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
        worker.kill()
        worker.wait()  # PyTorch's handler of this child's end would raise here, while what was told goes up
        assert told.value.__cause__ is not None
    finally:
        signal.signal(signal.SIGCHLD, handler)


class Unreachable(MicroBatches):
    def __getitem__(self, number: int) -> Wire:
        raise ConnectionResetError


def test_a_loader_beside_the_main_thread_tells_of_a_lost_worker_too(shards: Path) -> None:
    whole = load(shards, workers=0)
    loader = replace(whole, micro_batches=Unreachable(whole.micro_batches.rows, whole.micro_batches.plan, 6))
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="worker ended while it handed over"):
        thread.submit(lambda: next(iter(loader))).result()


@pytest.mark.slow
def test_workers_ignore_signals_that_are_meant_for_the_run(shards: Path) -> None:
    steps = iter(load(shards, workers=1, steps=200))
    next(steps)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for name in ("-TERM", "-USR1", "-INT"):  # from a process that is not their parent, as a scheduler does
        subprocess.run(["kill", name, *workers], check=True)
    assert workers and len(list(steps)) == 199
