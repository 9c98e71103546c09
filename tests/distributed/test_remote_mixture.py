"""A mixture of a local folder, S3 and a failing HTTP server: killed twice at 2 ranks, finished at 1 and at 4.

Real processes and servers on loopback; what is predicted comes from local copies of the same shards in one process.
"""

import json
import multiprocessing
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset
from object_stores import BUCKET, Faults, http_server, s3_server
from remote_mixture_cases import EPOCHS, GLOBAL_BATCH, SIZES, STEPS, Stores, consume, load

from data_pipeline.account import Account, Consumed, faults_of, take_account
from data_pipeline.digest import joined
from data_pipeline.indexing import index_shards
from mmpretrain.core.ranks import World
from mmpretrain.core.types import Skip

CHECKPOINT_EVERY = 4
UNUSABLE = {"http": (17, 101)}
"""Samples that hold no number."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of shards with names of their own, indexed."""
    folder = tmp_path_factory.mktemp("remote")
    for name, size in SIZES.items():
        (folder / name).mkdir()
        for start in range(0, size, 40):
            with webdataset.TarWriter(str(folder / name / f"{name}-{start:03}.tar")) as writer:
                for number in range(start, min(start + 40, size)):
                    text = "rubbish" if number in UNUSABLE.get(name, ()) else str(number)
                    writer.write({"__key__": f"{number:03}", "txt": text.encode()})
        index_shards([str(folder / name)], workers=1)
    return folder


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults(drop=0.15, corrupt=0.15, refuse=0.1)


@pytest.fixture(scope="module")
def stores(folder: Path, faults: Faults) -> Iterator[Stores]:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    patch = pytest.MonkeyPatch()
    with s3_server(port) as environment, http_server(folder, faults) as http:
        for name, value in environment.items():
            patch.setenv(name, value)
        store = fsspec.filesystem("s3")
        store.mkdir(BUCKET)
        store.put(sorted(map(str, (folder / "s3").iterdir())), f"{BUCKET}/s3/")
        shards = {"local": str(folder / "local"), "s3": f"s3://{BUCKET}/s3/*.tar", "http": f"{http}/http"}
        yield Stores(shards, environment)
    patch.undo()


@dataclass(frozen=True)
class Step:
    """What all ranks did together."""

    digest: int
    keys: tuple[str, ...]
    skips: tuple[Skip, ...]


class Attempt:
    """Processes that go on from a step, which is granted to all, and write down what they read in a folder."""

    def __init__(self, stores: Stores, folder: Path, ranks: int, start: int, workers: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["remote_mixture_cases"])
        folder.mkdir()
        self.files = [folder / f"rank-{rank}.jsonl" for rank in range(ranks)]
        self.grants, self.processes = [], []
        for rank, file in enumerate(self.files):
            theirs, ours = context.Pipe(duplex=False)
            arguments = (stores, folder.parent / "cache", file, World(rank, ranks), start, workers, theirs)
            self.processes.append(context.Process(target=consume, args=arguments))
            self.processes[-1].start()
            self.grants.append(ours)

    def do(self, steps: int) -> list[Step]:
        """Grant steps and wait until all ranks have done them; all that they have done."""
        self._grant(steps)
        deadline = time.monotonic() + 120
        while any(len(rows_of(file)) < steps for file in self.files):
            assert time.monotonic() < deadline and all(one.exitcode in (None, 0) for one in self.processes)
            time.sleep(0.002)
        return merged([rows_of(file)[:steps] for file in self.files])

    def kill_within_a_step(self) -> None:
        self._grant(1)
        for process in self.processes:
            process.kill()
        self.join(-signal.SIGKILL)

    def join(self, code: int) -> None:
        for process in self.processes:
            process.join(60)
        assert [process.exitcode for process in self.processes] == [code] * len(self.processes)

    def _grant(self, steps: int) -> None:
        for grant in self.grants:
            for _ in range(steps):
                grant.send(None)


def rows_of(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def merged(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[Step]:
    """Digests add up; keys follow each other in the order of ranks."""
    return [
        Step(
            joined(row["digest"] for row in rows),
            tuple(key for row in rows for key in row["keys"]),
            tuple(Skip(**skip) for row in rows for skip in row["skips"]),
        )
        for rows in zip(*ranks, strict=True)
    ]


@dataclass(frozen=True)
class Story:
    """The runs of this module."""

    predicted: list[Step]
    """By one process that was never killed, from local files."""
    finished: dict[int, list[Step]]
    """Ranks that finished the run -> the steps that survived of all its attempts."""
    cache: Path
    faults: Faults


@pytest.fixture(scope="module")
def story(folder: Path, stores: Stores, faults: Faults) -> Story:
    copies = {name: str(folder / name) for name in SIZES}
    alone = [Step(batch.digest, batch.keys, batch.skips) for (batch,) in load(copies, folder / "unused", World(), 0)]
    survived: list[Step] = []
    for number in range(2):
        attempt = Attempt(stores, folder / f"attempt-{number}", ranks=2, start=len(survived))
        done = survived + attempt.do(random.randrange(CHECKPOINT_EVERY + 1, 20))
        attempt.kill_within_a_step()
        survived = done[: len(done) // CHECKPOINT_EVERY * CHECKPOINT_EVERY]
    finished = {}
    for ranks in (1, 4):
        attempt = Attempt(stores, folder / f"at-{ranks}", ranks, start=len(survived), workers=int(ranks == 1))
        finished[ranks] = survived + attempt.do(STEPS - len(survived))
        attempt.join(0)
    return Story(alone, finished, folder / "cache", faults)


def account(folder: Path, steps: Mapping[int, Step]) -> Account:
    """Of these steps; it needs no store but only the indexes, here those of local copies."""
    order = load({name: str(folder / name) for name in SIZES}, folder / "unused", World(), 0).order
    consumed = [Consumed(number, step.digest) for number, step in steps.items()]
    return take_account(order, GLOBAL_BATCH, consumed, [skip for step in steps.values() for skip in step.skips])


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_step_is_the_predicted_one(story: Story, ranks: int) -> None:
    assert len(story.finished[ranks]) == STEPS
    for number, (step, wanted) in enumerate(zip(story.finished[ranks], story.predicted, strict=True)):
        assert (step.keys, step.digest) == (wanted.keys, wanted.digest), number


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_ledger_proves_every_sample_once_an_epoch(story: Story, folder: Path, ranks: int) -> None:
    found = account(folder, dict(enumerate(story.finished[ranks], 1)))
    assert faults_of(found) == []
    assert [(epoch.source, epoch.number, epoch.seen, epoch.skipped, epoch.to_come) for epoch in found.epochs] == [
        (name, number, size - len(UNUSABLE.get(name, ())), len(UNUSABLE.get(name, ())), 0)
        for name, size in SIZES.items()
        for number in range(EPOCHS)
    ]
    assert found.reasons == {"no number": EPOCHS * len(UNUSABLE["http"])}
    read = Counter(key for step in story.finished[ranks] for key in step.keys)
    unusable = {f"http-{number // 40 * 40:03}/{number:03}" for number in UNUSABLE["http"]}
    assert len(read) == sum(SIZES.values()) - len(unusable) and not unusable & read.keys()
    assert sum(read.values()) - EPOCHS * len(read) == EPOCHS * len(unusable)  # what stood in for them


def test_the_ledger_names_what_a_lost_step_held(story: Story, folder: Path) -> None:
    steps = dict(enumerate(story.finished[4], 1))
    lost = steps.pop(9)
    found = account(folder, steps)
    assert found.missing == (9,) and not found.differing
    first_numbers = {str(path): int(path.stem[-3:]) for path in folder.glob("*/*.tar")}
    named = {
        f"{Path(one.shard).stem}/{first_numbers[one.shard] + ordinal:03}"
        for epoch in found.epochs
        for one in epoch.lost
        for ordinal in range(one.first, one.last + 1)
    }
    unusable = {f"{Path(skip.shard).stem}/{skip.key}" for skip in lost.skips}
    assert len(named) == GLOBAL_BATCH and unusable <= named
    assert named - unusable <= set(lost.keys)


def test_the_servers_failed_and_the_cache_kept_to_its_limit(story: Story) -> None:
    assert min(story.faults.answers[outcome] for outcome in ("drop", "corrupt", "refuse", "served")) > 0
    kept = [path.stat().st_size for path in story.cache.glob("??/*") if not path.name.endswith(".unfinished")]
    assert 0 < sum(kept) <= 2_000_000
