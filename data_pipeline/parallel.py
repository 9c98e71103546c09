"""One function over many shards by several processes, with a progress bar on stderr.

Enter: a picklable function and its items. Leave: the results, in the order of the items. Refused: nothing; an error of
a worker is raised here, a worker that is killed becomes a DataError.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.progress import progress_bar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def run_parallel(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    workers: int | None,
    description: str,
    finished: Callable[[ResultT], None] | None = None,
) -> list[ResultT]:
    """Results in the order of `items`; `finished` is called here, in this process, as each is done.

    `workers` null means one per processor this process may use; 1 runs everything in this process.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; give at least 1, or leave it out for one per processor")
    count = min(workers or num_processors(), len(items))
    results: dict[int, ResultT] = {}
    with progress_bar() as progress:
        task = progress.add_task(description, total=len(items))
        for number, result in _unordered(function, items, count):
            results[number] = result
            if finished is not None:
                finished(result)
            progress.advance(task)
    return [results[number] for number in range(len(items))]


def _unordered(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int
) -> Iterator[tuple[int, ResultT]]:
    if workers <= 1:
        for number, item in enumerate(items):
            yield number, function(item)
        return
    # from a fork server, because a fork of a process with threads (progress bar, tensors) may never wake up; it imports
    # what the function needs once for all workers, where each spawned one would take seconds for that
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([(function.func if isinstance(function, partial) else function).__module__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(function, item): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, usually for want of memory; use fewer --workers, then run again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def num_processors() -> int:
    """Processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
