"""A mixture of a local folder, S3 and a failing HTTP server: killed twice at 2 ranks, finished at 1 and at 4.

Real processes and servers on loopback; what is predicted comes from local copies of the same shards in one process.
"""

import json
import multiprocessing
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pytest
import webdataset
from object_stores import BUCKET, Faults, http_server, s3_server
from remote_mixture_cases import EPOCHS, GLOBAL_BATCH, SIZES, STEPS, consume, load

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
def stores(folder: Path, faults: Faults) -> Iterator[dict[str, str]]:
    """Name -> where its shards are."""
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
        yield {"local": str(folder / "local"), "s3": f"s3://{BUCKET}/s3/*.tar", "http": f"{http}/http"}
    patch.undo()


class Ranks:
    """Processes that read the mixture; each step is granted to all."""

    def __init__(self, shards: Mapping[str, str], out: Path, size: int, start: int, workers: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["remote_mixture_cases"])
        self.out, self.size, self.step = out, size, start
        self.grants: list[Connection] = []
        self.processes = []
        for rank in range(size):
            theirs, ours = context.Pipe(duplex=False)
            world = World(rank, size)
            process = context.Process(target=consume, args=(shards, out.parent / "cache", out, world, start, workers, theirs))
            process.start()
            self.grants.append(ours)
            self.processes.append(process)

    def go_to(self, step: int) -> None:
        """Grant steps up to this one, and wait until all ranks have done it."""
        self._grant(step - self.step)
        self.step = step
        deadline = time.monotonic() + 120
        while any(len(rows_of(self.out, rank)) < step for rank in range(self.size)):
            assert time.monotonic() < deadline and all(p.exitcode in (None, 0) for p in self.processes)
            time.sleep(0.002)

    def kill_within_a_step(self) -> None:
        self._grant(1)
        for process in self.processes:
            process.kill()
        self._join(-9)

    def finish(self) -> None:
        self.go_to(STEPS)
        self._join(0)

    def _grant(self, steps: int) -> None:
        for grant in self.grants:
            for _ in range(steps):
                grant.send(None)

    def _join(self, code: int) -> None:
        for process in self.processes:
            process.join(60)
        assert [process.exitcode for process in self.processes] == [code] * self.size


def rows_of(out: Path, rank: int) -> list[dict[str, object]]:
    path = out / f"rank-{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def to_checkpoint(out: Path) -> int:
    """Take back what came after the last checkpoint that all ranks reached; the merged steps stay in one file."""
    merged = merge(out)
    step = len(merged) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    for path in out.glob("rank-*.jsonl"):
        path.unlink()
    (out / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in merged[:step]))
    for rank in range(1, 4):  # of as many ranks as may follow: nothing, which adds nothing
        none = [{**row, "digest": 0, "keys": [], "skips": []} for row in merged[:step]]
        (out / f"rank-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in none))
    return step


def merge(out: Path) -> list[dict[str, object]]:
    """The steps that all ranks did: digests added up, keys one after another."""
    ranks = [rows_of(out, rank) for rank in range(len(list(out.glob("rank-*.jsonl"))))]
    ranks = [rows for rows in ranks if rows]
    return [
        {
            "step": rows[0]["step"],
            "digest": joined(row["digest"] for row in rows),
            "keys": [key for row in rows for key in row["keys"]],
            "skips": [skip for row in rows for skip in row["skips"]],
        }
        for rows in zip(*ranks, strict=False)
    ]
