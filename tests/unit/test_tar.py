"""Our header walk against `tarfile` and `webdataset`, and every fault that those pass over."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.tar import group_samples, open_shard, walk_members
from mmpretrain.core.errors import DataError

PHOTO = bytes(range(256)) * 3  # 768 bytes: two blocks, the second half padding
Names = list[tuple[str, bytes]]
PAIRS: Names = [("a.jpg", PHOTO), ("a.txt", b"one"), ("b.jpg", PHOTO), ("b.txt", b"two")]


def write_tar(path: Path, members: Names, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def names_in(shard: Path) -> list[str]:
    with open_shard(shard) as data:
        return [member.name for member in walk_members(data, shard)]


def samples_in(shard: Path) -> dict[str, dict[str, bytes]]:
    with open_shard(shard) as data:
        return {
            group.key: {name: bytes(data[m.offset : m.offset + m.size]) for name, m in group.members}
            for group in group_samples(walk_members(data, shard), shard)
        }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_reads_as_tarfile_reads_it(tmp_path: Path, format: int) -> None:
    folders = "deep/" * 18  # with the file name past 100 characters: a prefix, a long-name header or a pax record
    members = [(f"{folders}{'n' * 20}.jpg", PHOTO), (f"{folders}{'n' * 20}.txt", "größe".encode())]
    shard = write_tar(tmp_path / "s.tar", members, format)
    with tarfile.open(shard) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    with open_shard(shard) as data:
        assert [(m.name, m.offset, m.size) for m in walk_members(data, shard)] == expected


def test_a_float_time_in_a_pax_header_does_not_matter(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 3, 1234567.25
            tar.addfile(info, io.BytesIO(b"xyz"))
    assert samples_in(tmp_path / "s.tar") == {"a": {"jpg": b"xyz", "txt": b"xyz"}}


def test_folders_and_stray_members_belong_to_no_sample_as_in_webdataset(tmp_path: Path) -> None:
    members = [("./x/a.b.JPG", PHOTO), ("./x/a.txt", b"t"), ("README", b"r"), ("__meta__", b"m"), ("y.json", b"{}")]
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("./x/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    theirs = {
        sample["__key__"]: {name: content for name, content in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False)
    }
    assert samples_in(shard) == theirs == {"./x/a": {"b.jpg": PHOTO, "txt": b"t"}, "y": {"json": b"{}"}}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (512 + 500, r"at byte 0: member 'a.jpg' should hold 768 bytes and the file ends after 500: it was cut off"),
        (1536 + 100, "at byte 1536: the file ends without an end-of-archive block"),
        (1536, "at byte 1536: the file ends without an end-of-archive block"),
    ],
)
def test_a_cut_is_found_wherever_it_falls(tmp_path: Path, keep: int, message: str) -> None:
    shard = write_tar(tmp_path / "s.tar", PAIRS)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=message):
        names_in(shard)


def test_any_flipped_bit_of_a_header_is_found_where_webdataset_loses_samples_silently(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", PAIRS)
    whole = shard.read_bytes()
    start = 2560  # the header of b.jpg
    for bit in np.random.default_rng(0).choice(np.arange(500 * 8), 60, replace=False):
        damaged = bytearray(whole)
        damaged[start + bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"s\.tar: at byte 2560: .*(damaged|not UTF-8)"):
            names_in(shard)
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)] == ["a"]


def test_a_wiped_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", PAIRS)
    content = bytearray(shard.read_bytes())
    content[2560:3072] = bytes(512)
    shard.write_bytes(content)
    with pytest.raises(DataError, match="at byte 2560: an end-of-archive block, and data behind it"):
        names_in(shard)


def test_a_copy_that_was_never_filled_in_is_found(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", PAIRS)
    with shard.open("ab") as file:
        file.truncate(3 << 20)
    with pytest.raises(DataError, match="bytes of zeros up to the end: the copy of this file never finished"):
        names_in(shard)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x/../../etc.txt", r"member 'x/\.\./\.\./etc.txt' climbs out of its folder"),
        ("/etc/a.txt", "member '/etc/a.txt' has an absolute name"),
        ("a.pkl", "'a.pkl' is a pickle member"),
        ("a.label.PYD", "is a pickle member"),
        ("a.pickle.gz", "is a pickle member"),
        ("a.pth", "is a pickle member"),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        names_in(write_tar(tmp_path / "s.tar", [("a.jpg", PHOTO), (name, b"x")]))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, what: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=f"member 'a.jpg' is {what}; only regular files are read"):
        names_in(tmp_path / "s.tar")


def test_members_of_a_key_that_stand_apart_are_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [PAIRS[0], PAIRS[2], PAIRS[1], PAIRS[3]])
    with pytest.raises(DataError, match=r"member 'a.txt' belongs to key 'a', whose sample ended earlier"):
        samples_in(shard)


def test_a_member_that_occurs_twice_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [*PAIRS[:2], ("a.txt", b"again")])
    with pytest.raises(DataError, match=r"at byte 2560: key 'a' holds \.txt twice, first at byte 1536"):
        samples_in(shard)


def test_with_a_report_every_fault_of_a_shard_is_told(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [*PAIRS, ("a.txt", b"again"), ("c.jpg", b""), ("c.jpg", b"")])
    faults: list[str] = []
    with open_shard(shard) as data:
        groups = list(group_samples(walk_members(data, shard), shard, lambda fault: faults.append(str(fault))))
    assert [group.key for group in groups] == ["a", "b", "a", "c"]
    assert len(faults) == 2
    assert "key 'a'" in faults[0]
    assert "key 'c' holds .jpg twice" in faults[1]


def test_an_empty_or_missing_shard_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar is empty \(0 bytes\)"):
        names_in(tmp_path / "empty.tar")
    with pytest.raises(DataError, match=r"none\.tar does not exist"):
        names_in(tmp_path / "none.tar")
    with pytest.raises(DataError, match="is not a file"):
        names_in(tmp_path)


def pax_member(path: Path, record: bytes) -> Path:
    """A tar whose first header is a pax header with this content."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        tar.addfile(header, io.BytesIO(record))
        tar.addfile(tarfile.TarInfo("a.txt"))
    return path


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"99 path=x.txt\n", "at byte 0: a damaged pax header; fetch or make the shard again"),
        (b"nonsense", "at byte 0: a damaged pax header"),
        (b"11 size=1x\n", "a damaged pax header: size '1x' is not a number"),
        (b"14 path=\xff.txt\n", "the member name .* is not UTF-8; rename it"),
    ],
)
def test_a_damaged_pax_header_is_found(tmp_path: Path, record: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        names_in(pax_member(tmp_path / "s.tar", record))


def test_a_size_past_the_octal_field_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.mp4")
        info.size = 9 << 30
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="member 'a.mp4' should hold 9663676416 bytes and the file ends after"):
        names_in(tmp_path / "s.tar")


def test_a_member_of_unknown_type_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type = b"Z"
        tar.addfile(info)
    with pytest.raises(DataError, match="member 'a.jpg' is of unknown type b'Z'; only regular files are read"):
        names_in(tmp_path / "s.tar")
