"""Many shards are opened by one file: no index is read but of those that are drawn from."""

import os
import re
from pathlib import Path

import pytest
from test_loader import NumberCodec, flat, write_shard

from data_pipeline import collection
from data_pipeline.array_file import encode_arrays, map_arrays
from data_pipeline.collection import COLLECTION, load_collection, survey
from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig, WeightChange
from data_pipeline.index import build_index, save_index
from data_pipeline.indexing import index_shards
from data_pipeline.loader import Loader, build_loader
from data_pipeline.part import Part
from data_pipeline.reader import SampleReader, open_sources
from data_pipeline.shards import resolve_shards
from mmpretrain.core.errors import DataError
from mmpretrain.core.ranks import BatchPlan, World

SHARDS, EACH = 1100, 20


def make_many(folder: Path, shards: int = SHARDS) -> Path:
    """Shards of the same bytes, which are on disk once, with a collection and without indexes."""
    folder.mkdir()
    first = folder / "00000.tar"
    write_shard(first, range(EACH))
    save_index(build_index(first))
    for number in range(1, shards):
        for name in (".tar", ".tar.index"):
            os.link(folder / f"00000{name}", folder / f"{number:05}{name}")
    index_shards([str(folder)], workers=1)
    for path in folder.glob("*.tar.index"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_many(tmp_path_factory.mktemp("many") / "set")


def indexes(folder: Path) -> int:
    """How many indexes were needed since: each is made when its shard is first read."""
    return len(list(folder.glob("*.tar.index")))


def load(folder: Path, start: int, steps: int) -> Loader:
    sources = {"many": SourceConfig(shards=(str(folder),)), "few": SourceConfig(shards=(str(folder / "00007.tar"),))}
    changes = (WeightChange(from_sample=5_000, weights={"many": 3.0, "few": 1.0}),)
    config = DataConfig(train=MixtureConfig(sources=sources, changes=changes), workers=0)
    return build_loader(config, {"number": NumberCodec()}, BatchPlan(16, 16, World()), 3, start, steps)


def test_many_shards_are_opened_mixed_and_sought_by_the_indexes_of_those_that_are_read(many: Path) -> None:
    loader = load(many, 0, 1)
    assert [source.num_samples for source in loader.sources] == [SHARDS * EACH, EACH]
    assert loader.sources[0].names[1] == "00001" and len(loader.fingerprint) == 16
    assert indexes(many) == 1, "that of the shard which is named by itself"
    far = 10**12 // 16
    rows = flat(load(many, far, far + 1))
    assert [position for *_, position in rows] == list(range(10**12, 10**12 + 16))
    assert 8 <= len({key.split("/")[0] for key, *_ in rows}) <= indexes(many) <= 13


def test_a_collection_tells_what_the_indexes_tell(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", range(3))
    write_shard(tmp_path / "b.tar", ["{}", "[]"], extension="json")
    shards = resolve_shards([str(tmp_path)])
    from_indexes = survey(shards, {})
    index_shards([str(tmp_path)], workers=1)
    told = load_collection(tmp_path)
    assert told is not None and list(told.values()) == from_indexes
    assert [contents.num_samples for contents in from_indexes] == [3, 2]


def test_parts_write_none_and_the_last_call_one(tmp_path: Path) -> None:
    for name in "abc":
        write_shard(tmp_path / f"{name}.tar", range(2))
    index_shards([str(tmp_path)], workers=1, part=Part(0, 2))
    index_shards([str(tmp_path / "b.tar")], workers=1)
    assert not (tmp_path / COLLECTION).exists()
    index_shards([str(tmp_path)], workers=1)
    write_shard(tmp_path / "c.tar", range(5))
    index_shards([str(tmp_path / "c.tar")], rebuild=True, workers=1)
    told = load_collection(tmp_path)
    assert told is not None and {name: one.num_samples for name, one in told.items()} == {
        "a.tar": 2, "b.tar": 2, "c.tar": 5,
    }  # fmt: skip


def test_shards_added_since_are_read_by_their_own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "FEW_SHARDS", 1)
    folder = make_many(tmp_path / "set", shards=3)
    write_shard(folder / "new.tar", range(4))
    (source,) = open_sources({"main": [str(folder)]})
    assert source.ends.tolist() == [20, 40, 60, 64] and indexes(folder) == 1


def test_a_shard_that_no_longer_holds_what_its_collection_says_is_refused_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "FEW_SHARDS", 1)
    folder = make_many(tmp_path / "set", shards=3)
    (folder / "00001.tar").unlink()
    write_shard(folder / "00001.tar", range(7))
    reader = SampleReader(open_sources({"main": [str(folder)]}))
    with pytest.raises(DataError, match=r"00001\.tar held 20 samples when the run began and holds 7 now; .*data index"):
        reader.find(0, 25)


def test_few_local_shards_are_looked_at_one_by_one(tmp_path: Path) -> None:
    folder = make_many(tmp_path / "set", shards=3)
    (folder / "00001.tar").unlink()
    write_shard(folder / "00001.tar", range(7))
    (source,) = open_sources({"main": [str(folder)]})
    assert source.ends.tolist() == [20, 27, 47]


def test_a_damaged_collection_is_refused_and_one_that_leads_elsewhere_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "FEW_SHARDS", 1)
    folder = make_many(tmp_path / "set", shards=3)
    file = folder / COLLECTION
    whole = file.read_bytes()
    file.write_bytes(whole[:-70])
    refusal = rf"{re.escape(str(file))} is damaged; run `mmpretrain data index {re.escape(str(folder))}`"
    with pytest.raises(DataError, match=refusal):
        open_sources({"main": [str(folder)]})
    file.write_bytes(whole)
    loaded = map_arrays(file, whole[:8])
    assert loaded is not None
    names = whole.replace(b"00001.tar", b"../01.tar")
    assert names != whole
    file.write_bytes(encode_arrays(whole[:8], {"kinds": loaded[0]["kinds"]}, _renamed(loaded[1])))
    with pytest.raises(DataError, match=r"collection\.index names '\.\./01\.tar', which is no file of its folder"):
        open_sources({"main": [str(folder)]})


@pytest.mark.parametrize("rebuild", [False, True])
def test_indexing_makes_a_damaged_collection_anew(tmp_path: Path, rebuild: bool) -> None:
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", range(3))
    index_shards([str(tmp_path)], workers=1)
    file = tmp_path / COLLECTION
    whole = file.read_bytes()
    file.write_bytes(whole[:-70])
    index_shards([str(tmp_path)], rebuild=rebuild, workers=1)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-70])
    index_shards([str(tmp_path / "a.tar")], rebuild=rebuild, workers=1)
    assert not file.exists(), "of b it could say nothing"


def _renamed(arrays: dict[str, collection.Array]) -> dict[str, collection.Array]:
    """With the second name leading out of the folder."""
    changed = {name: array.copy() for name, array in arrays.items()}
    changed["name_bytes"][9:12] = list(b"../")
    return changed
