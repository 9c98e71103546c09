"""The cache of a node: whole entries only, within its limit, for many processes at once."""

import hashlib
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
from other_user import as_another_user_in

from data_pipeline.cache import DiskCache
from mmpretrain.core.errors import DataError


def content(number: int, size: int = 1000) -> bytes:
    return (hashlib.sha256(str(number).encode()).digest() * (size // 32 + 1))[:size]


def key(number: int) -> str:
    return hashlib.sha256(repr(number).encode()).hexdigest()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def test_what_was_read_longest_ago_makes_room(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 10_000)
    for number in range(10):
        kept.ensure(key(number), lambda number=number: content(number))
    assert kept.read(key(0), lambda: b"", 5, 20) == (content(0)[5:25], False)
    kept.ensure(key(10), lambda: content(10))
    assert [number for number in range(11) if not kept.holds(key(number))] == [1, 2]
    assert sum(path.stat().st_size for path in entries(tmp_path)) == 9000


def test_what_a_reader_holds_is_never_removed(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 3000)
    kept.ensure(key(0), lambda: content(0))
    with kept.held(key(0)) as file:
        assert file is not None
        for number in range(1, 20):
            kept.ensure(key(number), lambda number=number: content(number))
        assert kept.holds(key(0)) and os.pread(file, 1000, 0) == content(0)
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 3000
    kept.ensure(key(20), lambda: content(20))
    kept.ensure(key(21), lambda: content(21))
    assert not kept.holds(key(0))


def test_an_entry_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache\.limit is 10 bytes, and one part of a shard takes 1000"):
        DiskCache(tmp_path, 10).ensure(key(0), lambda: content(0))
    assert not entries(tmp_path)


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise DataError("away")

    kept = DiskCache(tmp_path, 10_000)
    with pytest.raises(DataError, match="away"):
        kept.ensure(key(0), fail)
    assert not entries(tmp_path) and kept.ensure(key(0), lambda: content(0)) == content(0)


def test_an_entry_that_another_finished_since_it_was_looked_for_is_not_fetched_again(tmp_path: Path) -> None:
    class Overtaken(DiskCache):
        def holds(self, key: str) -> bool:
            found = super().holds(key)
            DiskCache(tmp_path, 3000).ensure(key, lambda: content(0))
            return found

    assert Overtaken(tmp_path, 3000).ensure(key(0), lambda: pytest.fail("fetched twice")) is None
    assert [path.name for path in entries(tmp_path)] == [key(0)]


def test_what_a_killed_writer_left_is_taken_over_and_counted_once(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 2500)
    kept.ensure(key(0), lambda: content(0))
    unfinished = kept.path_of(key(1)).with_name(key(1) + ".unfinished")
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(bytes(1000))
    (tmp_path / "used").write_text("2000")  # it had promised its bytes
    assert kept.read(key(1), lambda: content(1), 0, 1000) == (content(1), True)
    assert int((tmp_path / "used").read_text()) == 2000 and kept.holds(key(0))


def test_an_entry_gets_its_name_while_nobody_counts(tmp_path: Path) -> None:
    reserved, counting = Event(), Event()

    class Waiting(DiskCache):
        def _fill(self, key: str, file: int, content: bytes) -> None:
            reserved.set()
            counting.wait()
            super()._fill(key, file, content)

    kept = Waiting(tmp_path, 3000)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(kept.ensure, key(0), lambda: content(0))
        reserved.wait()
        with kept._counting():
            counting.set()
            assert not wait([writing], timeout=0.2).done and [path.name for path in entries(tmp_path)] != [key(0)]
        assert writing.result() == content(0)


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"the cache folder .*file cannot be used \(Not a directory\); .*data.cache.folder"
    ):
        DiskCache(tmp_path / "file", 10_000).ensure(key(0), lambda: content(0))


def test_entries_of_another_user_are_read_and_those_he_locked_away_are_refused(tmp_path: Path) -> None:
    DiskCache(tmp_path, 10_000).ensure(key(0), lambda: content(0))
    kept, (entry,) = DiskCache(Path(), 10_000), entries(tmp_path)
    with as_another_user_in(tmp_path):
        assert kept.read(key(0), lambda: pytest.fail("fetched again"), 0, 1000) == (content(0), False)
    for locked in (entry, entry.parent):
        locked.chmod(0)
        refusal = pytest.raises(DataError, match=r"the cache folder \. cannot be used \(Permission denied\); give a ")
        with as_another_user_in(tmp_path), refusal:
            kept.read(key(0), lambda: pytest.fail("fetched again"), 0, 1000)


def hammer(folder: str, seed: int, limit: int, log: str) -> None:
    """Read entries over and over, each of which must be whole, and note what was fetched."""
    kept = DiskCache(Path(folder), limit)
    fetched = []
    for turn in range(300):
        number = (seed * 7 + turn) % 40

        def fetch(number: int = number) -> bytes:
            fetched.append(number)
            return content(number, 1000 + number)

        found, _ = kept.read(key(number), fetch, number, 900)
        assert found == content(number, 1000 + number)[number : number + 900]
    Path(log).write_text(str(len(fetched)))


@pytest.mark.parametrize("limit", [100_000, 12_000])
def test_processes_that_share_a_cache_see_whole_entries_within_the_limit(tmp_path: Path, limit: int) -> None:
    context = multiprocessing.get_context("fork")
    logs = [tmp_path / f"log{seed}" for seed in range(4)]
    workers = [
        context.Process(target=hammer, args=(str(tmp_path / "cache"), seed, limit, str(log)))
        for seed, log in enumerate(logs)
    ]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers):
        with DiskCache(tmp_path / "cache", limit)._counting():  # or entries come and go while they are added up
            largest = max(largest, on_disk(tmp_path / "cache"))
        time.sleep(0.002)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert largest <= limit
    if limit == 100_000:  # all fit: whoever comes first fetches for everyone
        assert sum(int(log.read_text()) for log in logs) == 40
        assert int((tmp_path / "cache" / "used").read_text()) == on_disk(tmp_path / "cache")


def on_disk(folder: Path) -> int:
    total = 0
    for path in entries(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
