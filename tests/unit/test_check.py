"""`data check` and `data index` name every injected fault, with its shard and key, and pass what is sound."""

import io
import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from other_user import as_another_user_in
from PIL import Image

from data_pipeline.check import Finding, check, check_shard
from data_pipeline.index import load_or_build_index
from data_pipeline.indexing import IndexSummary, index_shards
from mmpretrain.core.errors import DataError


def picture() -> bytes:
    target = BytesIO()
    Image.linear_gradient("L").convert("RGB").save(target, "JPEG")
    return target.getvalue()


def write_shard(path: Path, prefix: str = "s", **replaced: bytes) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(4):
            members = {"jpg": picture(), "txt": b"words", "json": b"{}"} | (replaced if number == 2 else {})
            writer.write({"__key__": f"{prefix}{number}", **members})
    return path


def findings(shard: Path) -> list[tuple[str, str]]:
    return [(finding.key, finding.what) for finding in check_shard(shard).findings if finding.is_fault]


def test_sound_shards_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        load_or_build_index(write_shard(tmp_path / f"{number}.tar", prefix=f"{number}-"))
    report = check([str(tmp_path)], workers=2)
    assert (report.shards, report.samples, report.findings) == (3, 12, ())
    assert "3 shards, 12 samples: 0 faults, 0 notes" in capsys.readouterr().out


def test_every_fault_of_a_folder_is_told_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "sound.tar", prefix="sound")
    cut = write_shard(tmp_path / "cut.tar", prefix="cut")
    cut.write_bytes(cut.read_bytes()[:6000])
    write_shard(tmp_path / "broken.tar", prefix="broken", jpg=picture()[:-700])
    with pytest.raises(DataError, match=r"2 faults in 2 of 3 shards: .*broken\.tar, .*cut\.tar; fetch or make"):
        check([str(tmp_path)], workers=1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 faults" in shown
    assert "broken2" in shown


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("jpg", picture()[:1500], ".jpg: the image cannot be decoded: image file is truncated"),
        ("jpg", b"<html>", ".jpg: the image cannot be opened: of no known format"),
        ("json", b"{", "the .json member is not JSON"),
        ("json", b'{"captions": [1]}', "the captions in .json are not a list of text"),
        ("txt", b"\xff\xfe", "the .txt member is not UTF-8"),
        ("wav", b"no sound", ".wav: its content is no known media type"),
    ],
)
def test_an_undecodable_member_is_named(tmp_path: Path, member: str, content: bytes, message: str) -> None:
    [(key, what)] = findings(write_shard(tmp_path / "s.tar", **{member: content}))
    assert key == "s2"
    assert what.startswith(message)


def test_a_flipped_bit_in_a_payload_is_named_once_the_shard_is_indexed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    index = load_or_build_index(shard)
    offset, _ = index.sample_range(1)
    content = bytearray(shard.read_bytes())
    content[offset + 3000] ^= 1
    shard.write_bytes(content)
    assert ("s1", "its bytes changed since the shard was indexed") in findings(shard)


def test_samples_before_a_damaged_header_are_still_checked(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", jpg=b"broken")
    start, _ = load_or_build_index(shard).sample_range(3)
    content = bytearray(shard.read_bytes())
    content[start + 5] ^= 1
    shard.write_bytes(content)
    found = findings(shard)
    assert [key for key, _ in found] == ["", "s3", "s2"]
    assert found[0][1].startswith(f"at byte {start}: this is no tar header, or a damaged one")


def test_duplicate_keys_within_a_shard_are_faults_and_across_shards_notes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.txt", "y.txt", "x.txt", "z.txt", "z.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"t"))
    whats = [what for _, what in findings(tmp_path / "a.tar")]
    assert len(whats) == 2
    assert "key 'x', whose sample ended earlier in this shard: a duplicate key" in whats[0]
    assert "key 'z' holds .txt twice" in whats[1]
    (tmp_path / "a.tar").unlink()
    first, second = write_shard(tmp_path / "b.tar"), write_shard(tmp_path / "c.tar")
    report = check([str(tmp_path)], workers=1)
    assert report.findings == (
        Finding(str(second), "s0", f"4 keys also stand in other shards, the first in {first}", is_fault=False),
    )


def test_samples_that_do_not_pair_up_are_noted(tmp_path: Path) -> None:
    uneven, single = tmp_path / "uneven.tar", tmp_path / "single.tar"
    with webdataset.TarWriter(str(uneven)) as writer:
        for number in range(3):
            writer.write({"__key__": str(number), "txt": "t"} | ({"jpg": picture()} if number else {}))
    with webdataset.TarWriter(str(single)) as writer:
        writer.write({"__key__": "a", "txt": "t"})
        writer.write({"__key__": "b", "jpg": picture()})
        writer.tarstream.addfile(tarfile.TarInfo("README"))
    assert [note.what for note in check_shard(uneven).findings] == [
        "1 samples have other members than the usual .jpg, .txt"
    ]
    assert [note.what for note in check_shard(single).findings] == [
        "1 members belong to no sample (hidden, or without an extension)",
        "1 samples have other members than the usual .txt",
        "a tar without pairs: every sample has a single member",
    ]


def test_indexing_names_all_faulty_shards_and_keeps_the_others(tmp_path: Path) -> None:
    good, cut = write_shard(tmp_path / "good.tar"), write_shard(tmp_path / "cut.tar")
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(DataError, match=r"2 of 3 shards cannot be indexed:\n  .*cut\.tar: at byte .*\n  .*text\.tar: "):
        index_shards([str(tmp_path)], workers=1)
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [f"{good.name}.index"]


def test_shards_and_indexes_out_of_reach_are_named_and_the_others_are_indexed_and_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "good.tar")
    load_or_build_index(write_shard(tmp_path / "index.tar"))
    (tmp_path / "index.tar.index").unlink()
    (tmp_path / "index.tar.index").mkdir()
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    faults = (
        r"index\.tar\.index cannot be read: Is a directory; let this user read it, or remove it\n"
        r"  .*loop\.tar cannot be read: Too many levels of symbolic links"
    )
    with pytest.raises(DataError, match=rf"2 of 3 shards cannot be indexed:\n  .*{faults}"):
        index_shards([str(tmp_path)], workers=1)
    assert (tmp_path / "good.tar.index").exists()
    with pytest.raises(DataError, match=r"2 faults in 2 of 3 shards: .*index\.tar, .*loop\.tar"):
        check([str(tmp_path)], workers=1)


def test_shards_and_indexes_of_another_user_are_named_and_the_others_are_indexed_and_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "good.tar")
    load_or_build_index(write_shard(tmp_path / "index.tar"))
    (tmp_path / "index.tar.index").chmod(0o600)
    write_shard(tmp_path / "tar.tar").chmod(0o600)
    faults = (
        r"index\.tar\.index cannot be read: Permission denied; let this user read it, or remove it\n"
        r"  shard tar\.tar cannot be read: Permission denied; mend it, or let this user read it"
    )
    with as_another_user_in(tmp_path):
        with pytest.raises(DataError, match=rf"2 of 3 shards cannot be indexed:\n  {faults}"):
            index_shards(["."], workers=1)
        with pytest.raises(DataError, match=r"2 faults in 2 of 3 shards: index\.tar, tar\.tar"):
            check(["."], workers=1)


def test_a_changed_shard_is_indexed_again_only_when_asked(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar")
    other = write_shard(tmp_path / "other", json=json.dumps({"caption": "a" * 600}).encode())
    assert index_shards([str(shard)], workers=1) == IndexSummary(1, 4, shard.stat().st_size, 0)
    shutil.copy(other, shard)
    with pytest.raises(DataError, match=r"s\.tar changed since it was indexed"):
        index_shards([str(shard)], workers=1)
    assert index_shards([str(shard)], rebuild=True, workers=1).samples == 4
    assert load_or_build_index(shard).members(2)[1][2] == 615
