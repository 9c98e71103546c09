"""The index of a shard: one read per sample gives what webdataset reads, and a changed shard is refused."""

import json
import logging
import os
import pickle
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_pipeline.index import (
    ShardIndex,
    build_index,
    changed_samples,
    index_path,
    load_or_build_index,
)
from mmpretrain.core.errors import DataError


def photo(width: int, height: int) -> bytes:
    target = BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(target, "JPEG")
    return target.getvalue()


def write_shard(path: Path, num_samples: int = 5) -> Path:
    """The layout of img2dataset: .jpg, .json with the facts of the download, .txt."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(num_samples):
            caption = f"photo {number}"
            writer.write(
                {
                    "__key__": f"{number:09d}",
                    "jpg": photo(40 + number, 30),
                    "txt": caption,
                    "json": json.dumps({"caption": caption, "url": "x", "status": "success"}).encode(),
                }
            )
    return path


def read_sample(index: ShardIndex, ordinal: int) -> dict[str, bytes]:
    offset, length = index.sample_range(ordinal)
    file = os.open(index.shard, os.O_RDONLY)
    content = os.pread(file, length, offset)
    os.close(file)
    assert zlib.crc32(content) == index.crc32(ordinal)
    return index.slice_members(ordinal, content)


def test_one_read_of_a_sample_gives_what_webdataset_reads(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    index = build_index(shard)
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert index.num_samples == len(theirs) == 5
    assert index.keys() == [sample["__key__"] for sample in theirs]
    for ordinal, sample in enumerate(theirs):
        assert read_sample(index, ordinal) == {name: sample[name] for name in ("jpg", "json", "txt")}


def test_the_facts_come_from_headers_and_captions(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "a", "jpg": photo(64, 48), "json": json.dumps({"captions": ["ab", "abcd"]}).encode()})
        writer.write({"__key__": "b", "jpg": b"no image", "txt": "abc"})
        writer.write({"__key__": "c", "json": b"no json"})
    facts = build_index(shard).facts
    assert facts.width.tolist() == [64, 0, 0]
    assert facts.height.tolist() == [48, 0, 0]
    assert facts.captions.tolist() == [2, 1, 0]
    assert facts.characters.tolist() == [4, 3, 0]


def test_the_saved_index_equals_the_built_one_and_travels_to_workers(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    built = load_or_build_index(shard)
    assert index_path(shard).name == "s.tar.index"
    loaded = load_or_build_index(shard)
    for index in (loaded, pickle.loads(pickle.dumps(loaded))):  # noqa: S301 - our own bytes
        assert index.keys() == built.keys()
        assert [index.members(n) for n in range(5)] == [built.members(n) for n in range(5)]
        assert [index.sample_range(n) for n in range(5)] == [built.sample_range(n) for n in range(5)]
        assert index.facts.width.tolist() == [40, 41, 42, 43, 44]
        assert (index.extensions, index.ignored) == (("jpg", "json", "txt"), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar", "s.tar.index"]


def test_a_shard_that_changed_in_size_or_content_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    load_or_build_index(shard)
    content = shard.read_bytes()
    message = r"s\.tar changed since it was indexed; .*mmpretrain data index .* --rebuild"
    shard.write_bytes(content + bytes(512))
    with pytest.raises(DataError, match=message):
        load_or_build_index(shard)
    shard.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    os.utime(shard, (1, 1))
    with pytest.raises(DataError, match=message):
        load_or_build_index(shard)


def test_a_copy_of_the_same_bytes_keeps_its_index(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    load_or_build_index(shard)
    os.utime(shard, (1, 1))
    assert load_or_build_index(shard).shard_mtime_ns == 1_000_000_000
    assert load_or_build_index(shard).num_samples == 5


def test_a_flipped_payload_bit_is_found_by_the_checksums(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    index = load_or_build_index(shard)
    offset, _ = index.sample_range(3)
    content = bytearray(shard.read_bytes())
    content[offset + 600] ^= 4
    shard.write_bytes(content)
    assert list(changed_samples(index)) == [3]


@pytest.mark.parametrize("keep", [0, 10, 40, 400])
def test_a_damaged_index_is_refused(tmp_path: Path, keep: int) -> None:
    shard = write_shard(tmp_path / "s.tar")
    load_or_build_index(shard)
    index_path(shard).write_bytes(index_path(shard).read_bytes()[:keep])
    with pytest.raises(DataError, match=r"s\.tar\.index is damaged; run `mmpretrain data index .* --rebuild`"):
        load_or_build_index(shard)


def test_an_index_of_another_version_is_built_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    load_or_build_index(shard)
    index_path(shard).write_bytes(b"MMPIDX99" + index_path(shard).read_bytes()[8:])
    assert load_or_build_index(shard).num_samples == 5
    assert index_path(shard).read_bytes().startswith(b"MMPIDX01")


def test_where_indexes_cannot_be_written_they_stay_in_memory_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{number}{'n' * 240}.tar" for number in range(2)]  # the unfinished file's name passes 255 characters
    with caplog.at_level(logging.WARNING):
        indexes = [load_or_build_index(write_shard(tmp_path / name)) for name in names]
    assert [index.num_samples for index in indexes] == [5, 5]
    assert len(caplog.records) == 1
    assert "cannot be saved (File name too long); they are rebuilt in memory by every run" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_tar_without_samples_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.tar"
    with webdataset.TarWriter(str(empty)) as writer:
        writer.tarstream.addfile(tarfile.TarInfo("README"))
    with pytest.raises(DataError, match=r"empty\.tar holds no sample; members are named `key\.extension`"):
        build_index(empty)


def test_samples_are_told_by_the_extensions_of_their_members(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number, members in enumerate(({"jpg": b"", "txt": ""}, {"jpg": b""}, {"txt": ""}, {"png": b"", "txt": ""})):
            writer.write({"__key__": str(number), **members})
    index = build_index(tmp_path / "s.tar")
    assert index.holds(frozenset({"jpg", "png"})).tolist() == [True, True, False, True]
    assert index.holds(frozenset({"wav"})).tolist() == [False] * 4
