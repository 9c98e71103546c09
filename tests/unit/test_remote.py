"""Shards in object stores: read in ranges from real servers that fail, kept in a cache that processes share."""

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset
from object_stores import BUCKET, Faults, http_server, s3_server
from test_loader import NumberCodec, flat

from data_pipeline.array_file import fault_in
from data_pipeline.check import check
from data_pipeline.config import CacheConfig, DataConfig, MixtureConfig, SourceConfig
from data_pipeline.index import load_or_build_index
from data_pipeline.index_file import INDEX_MAGIC
from data_pipeline.indexing import index_shards
from data_pipeline.loader import Loader, build_loader
from data_pipeline.reader import SampleReader, open_sources, read_members
from data_pipeline.remote import RemoteFile, RemoteShard
from data_pipeline.shards import resolve_shards
from data_pipeline.stores import AbsentObject, DamagedContent, Patience, read_range, read_whole
from mmpretrain.core.config import config_hash
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.ranks import BatchPlan, World

SAMPLES = 600
"""In shards of 200, so that chunks of 256 cross them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three indexed shards, their collection file, and a list of them."""
    folder = tmp_path_factory.mktemp("store") / "set"
    folder.mkdir()
    for start in range(0, SAMPLES, 200):
        with webdataset.TarWriter(str(folder / f"{start:03}.tar")) as writer:
            for number in range(start, start + 200):
                writer.write({"__key__": f"{number:04}", "txt": str(number).encode()})
    index_shards([str(folder)], workers=1)
    (folder / "list.txt").write_text("# the set\n" + "".join(f"{path.name}\n" for path in sorted(folder.glob("*.tar"))))
    return folder


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def server(folder: Path, faults: Faults) -> Iterator[str]:
    with http_server(folder.parent, faults) as url:
        yield url


def cache(tmp_path: Path, **fields: object) -> CacheConfig:
    return CacheConfig(**{"folder": tmp_path / "cache", "attempts": 12, "timeout_s": 20.0, **fields})  # type: ignore[arg-type]


def load(pattern: str, config: CacheConfig, steps: int = 50, workers: int = 0) -> Loader:
    train = MixtureConfig(sources={"main": SourceConfig(shards=(pattern,))})
    data = DataConfig(train=train, workers=workers, cache=config)
    return build_loader(data, {"number": NumberCodec()}, BatchPlan(12, 12, World()), 3, 0, steps)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.stores._FIRST_PAUSE_S", 0.001)


def test_a_server_that_drops_refuses_and_corrupts_gives_the_rows_of_the_local_folder(
    tmp_path: Path, folder: Path, server: str, faults: Faults
) -> None:
    wanted = flat(load(str(folder), cache(tmp_path)))
    faults.drop, faults.corrupt, faults.refuse = 0.2, 0.2, 0.2
    seen = flat(load(f"{server}/set", cache(tmp_path)))
    assert seen == wanted and sorted(number for _, number, *_ in seen) == list(range(SAMPLES))
    assert min(faults.answers[outcome] for outcome in ("drop", "corrupt", "refuse", "served")) > 0


@pytest.mark.parametrize("pattern", ["set", "set/", "set/*.tar", "set/list.txt"])
def test_folders_globs_and_lists_name_the_same_shards(tmp_path: Path, server: str, pattern: str) -> None:
    found = resolve_shards([f"{server}/{pattern}"], cache(tmp_path))
    assert [shard.name for shard in found] == ["000.tar", "200.tar", "400.tar"]


def test_a_chunk_is_fetched_once_an_epoch_and_the_index_never_where_a_collection_tells(
    tmp_path: Path, server: str, folder: Path, faults: Faults
) -> None:
    loader = load(f"{server}/set", cache(tmp_path), steps=100)
    assert faults.answers["GET collection.index"] == 1 and faults.answers["GET 000.tar.index"] == 0
    flat(loader)
    fetched = {name: count for name, count in faults.answers.items() if name.endswith(".tar")}
    assert fetched == {"GET 000.tar": 1, "GET 200.tar": 2, "GET 400.tar": 2}  # cut where chunks end: 256 and 512
    assert all(faults.answers[f"GET {name}.tar.index"] == 1 for name in ("000", "200", "400"))
    sizes = sum(path.stat().st_size for path in folder.glob("0*") if path.suffix in (".tar", ".index"))
    assert faults.bytes_sent < 3 * sizes + 200_000


def test_samples_can_be_fetched_one_by_one(tmp_path: Path, server: str, faults: Faults) -> None:
    rows = flat(load(f"{server}/set", cache(tmp_path, part="sample", ahead=0), steps=2))
    assert len(rows) == 24
    assert sum(count for name, count in faults.answers.items() if name.endswith(".tar")) == 24


@pytest.mark.parametrize(("ahead", "coming"), [(60, 5), (1, 1)])
def test_the_coming_steps_are_fetched_before_they_are_read(
    tmp_path: Path, server: str, faults: Faults, ahead: int, coming: int
) -> None:
    config = cache(tmp_path, part="sample", ahead=ahead)
    steps = iter(load(f"{server}/set", config, steps=20))
    next(steps)
    deadline = time.monotonic() + 30
    while tars(faults) < (1 + coming) * 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tars(faults) == (1 + coming) * 12  # the step that is read, and those ahead
    steps.close()  # type: ignore[attr-defined]


def tars(faults: Faults) -> int:
    return sum(count for name, count in faults.answers.items() if name.endswith(".tar"))


def test_a_shard_without_an_index_is_indexed_by_one_pass(tmp_path: Path, folder: Path, faults: Faults) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    os.link(folder / "000.tar", bare / "000.tar")
    with http_server(tmp_path, faults) as server:
        (shard,) = resolve_shards([f"{server}/bare/000.tar"], cache(tmp_path))
        index = load_or_build_index(shard)
        wanted = load_or_build_index(folder / "000.tar")
        assert index.keys() == wanted.keys() and index.checksum.tolist() == wanted.checksum.tolist()
        passes = faults.answers["GET 000.tar"]
        assert load_or_build_index(shard).keys() == wanted.keys()
        assert faults.answers["GET 000.tar"] == passes
        assert read_members(index, 7) == {"txt": b"7"}


def test_a_store_that_stays_away_is_named_with_what_was_tried(tmp_path: Path, server: str, faults: Faults) -> None:
    faults.refuse = 1.0
    with pytest.raises(
        DataError, match=r"/set/000\.tar\.index: gave up after 3 attempts in .* the last: ClientResponseError: 503"
    ) as refused:
        load_or_build_index(RemoteShard(f"{server}/set/000.tar", cache(tmp_path, attempts=3)))
    assert refused.value.exit_code == 3
    with pytest.raises(DataError, match=r"gave up after 2 attempts .* check the network and the store"):
        resolve_shards(["http://127.0.0.1:9/set"], cache(tmp_path, attempts=2))


def test_a_server_without_ranges_and_one_that_never_ends_are_told_apart(server: str, faults: Faults) -> None:
    faults.ignore_ranges = True
    with pytest.raises(DataError, match=r"\d+ bytes came for the 10 from byte 5 on, so the server gives no ranges"):
        read_range(f"{server}/set/000.tar", 5, 10, Patience(2, 5.0))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DataError, match="gave up after 1 attempts in .* the last: FSTimeoutError"):
            read_whole(f"http://127.0.0.1:{silent.getsockname()[1]}/x", Patience(1, 0.2))


def test_what_is_not_there_or_not_allowed_is_not_tried_again(tmp_path: Path, server: str, faults: Faults) -> None:
    with pytest.raises(AbsentObject, match=r"absent\.tar does not exist; check the address"):
        load_or_build_index(RemoteShard(f"{server}/set/absent.tar", cache(tmp_path)))
    assert faults.answers["GET absent.tar.index"] == 1
    with pytest.raises(DataError, match=r"the store lists no such \.tar there"):
        resolve_shards([f"{server}/set/9*.tar"], cache(tmp_path))


def test_a_sample_that_is_damaged_in_the_store_is_refused_and_its_neighbours_are_not(
    tmp_path: Path, folder: Path, faults: Faults
) -> None:
    damaged = tmp_path / "set"
    damaged.mkdir()
    index = load_or_build_index(folder / "000.tar")
    content = bytearray((folder / "000.tar").read_bytes())
    content[index.sample_range(3)[0] + 512] ^= 1
    (damaged / "000.tar").write_bytes(content)
    (damaged / "000.tar.index").write_bytes((folder / "000.tar.index").read_bytes())
    with http_server(tmp_path, faults) as server:
        shard = RemoteShard(f"{server}/set/000.tar", cache(tmp_path, attempts=2))
        file = RemoteFile(shard, load_or_build_index(shard), 0)
        for _ in range(2):
            with pytest.raises(SampleError, match="differ from the checksum in the shard's index, however often"):
                file.read(3)
        assert index.slice_members(4, file.read(4)) == {"txt": b"4"}
        assert faults.answers["GET 000.tar"] == 2


def test_a_cached_part_that_rotted_on_disk_is_fetched_again(tmp_path: Path, server: str, faults: Faults) -> None:
    shard = RemoteShard(f"{server}/set/000.tar", cache(tmp_path))
    file = RemoteFile(shard, load_or_build_index(shard), 0)
    wanted = file.read(3)
    entry = max((tmp_path / "cache").glob("??/*"), key=lambda path: path.stat().st_size)
    entry.write_bytes(bytes(entry.stat().st_size))
    assert file.read(3) == wanted and faults.answers["GET 000.tar"] == 2


def test_an_index_that_was_damaged_on_its_way_is_told_by_its_checksum(folder: Path) -> None:
    content = bytearray((folder / "000.tar.index").read_bytes())
    assert fault_in(bytes(content), INDEX_MAGIC) is None
    content[-200] ^= 1
    assert fault_in(bytes(content), INDEX_MAGIC) == "its bytes differ from the checksum in its header"
    assert "no whole index" in str(fault_in(bytes(content[:300]), INDEX_MAGIC))


def test_what_stays_damaged_is_told_by_a_worker_too(server: str) -> None:
    with pytest.raises(DamagedContent, match="gave up after 2 attempts in .* the last: they are no rows") as refused:
        read_whole(f"{server}/set/list.txt", Patience(2, 5.0), lambda content: "they are no rows")
    handed = pickle.loads(pickle.dumps(refused.value))  # noqa: S301
    assert str(handed) == str(refused.value) and handed.content.startswith(b"# the set")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ftp://host/a.tar", r"ftp: is not read; known are local paths and s3://"),
        ("https://me:secret@host/a.tar", r"shards at https://host/a\.tar: the address carries a user"),
        ("https://host/a.tar?sig=secret", r"what opens a store does not belong in a config"),
        ("s3://bucket/*/a.tar", "only the last part of an address may hold wildcards"),
    ],
)
def test_addresses_are_refused_without_their_secrets(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        resolve_shards([pattern], cache(tmp_path))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "line", ["/etc/passwd.tar", "../other/a.tar", "file:///etc/a.tar", "https://u:p@h/a.tar", "a.txt"]
)
def test_a_list_leads_nowhere_else(tmp_path: Path, faults: Faults, line: str) -> None:
    (tmp_path / "list.txt").write_text(line)
    with (
        http_server(tmp_path, faults) as server,
        pytest.raises(DataError, match=r"list\.txt names|is not read|carries"),
    ):
        resolve_shards([f"{server}/list.txt"], cache(tmp_path))


def test_a_missing_client_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"of gs:// URLs needs gcsfs, .*; run pip install 'mmpretrain\[gcs\]'"):
        resolve_shards(["gs://bucket/set"], cache(tmp_path))


def test_sizes_are_read_and_refused() -> None:
    assert [CacheConfig(limit=text).limit_bytes for text in ("200GB", "1.5 TB", "3MiB", "7B")] == [
        200 * 10**9, 1500 * 10**9, 3 * 2**20, 7,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'plenty' is no size; write e.g. 200GB"):
        CacheConfig(limit="plenty")
    assert config_hash(CacheConfig()) != config_hash(CacheConfig(limit="1GB"))


def test_shards_on_s3_are_found_read_and_checked(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(free_port()) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
        store = fsspec.filesystem("s3")
        store.mkdir(BUCKET)
        store.put(sorted(map(str, folder.glob("*.tar*"))), f"{BUCKET}/set/")
        shards = resolve_shards([f"s3://{BUCKET}/set"], cache(tmp_path))
        assert [str(shard) for shard in shards] == [f"s3://{BUCKET}/set/{name}.tar" for name in ("000", "200", "400")]
        assert all(isinstance(shard, RemoteShard) and shard.index_version for shard in shards)
        assert check([f"s3://{BUCKET}/set/{{000..000}}.tar"], workers=1).samples == 200
        wanted = flat(load(str(folder), cache(tmp_path), steps=50))
        assert flat(load(f"s3://{BUCKET}/set/*.tar", cache(tmp_path), steps=50)) == wanted
        with pytest.raises(AbsentObject, match=r"s3://nowhere/set/ does not exist|s3://nowhere/set"):
            resolve_shards(["s3://nowhere/set"], cache(tmp_path))


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


# the cache by itself


def test_a_cache_too_small_for_what_is_live_is_warned_of(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        next(iter(load(f"{server}/set", cache(tmp_path, limit="1MB"))))
    assert "data.cache.limit 1MB is less than the" in caplog.text


def test_workers_and_the_fetching_thread_share_the_cache(tmp_path: Path, server: str, faults: Faults) -> None:
    sources = open_sources({"main": [f"{server}/set"]}, cache=cache(tmp_path))
    reader = SampleReader(sources)
    assert [reader.find(0, number).read().members["txt"] for number in (0, 599)] == [b"0", b"599"]
    before = tars(faults)
    assert len(flat(load(f"{server}/set", cache(tmp_path), steps=4, workers=1))) == 48
    assert tars(faults) <= before + 3
