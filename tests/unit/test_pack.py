"""Packing: what webdataset reads back, what is dropped and why; nothing depends on workers or interruptions."""

import csv
import json
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data_pipeline.index import load_index
from data_pipeline.pack import PackSummary, pack
from data_pipeline.pack_sources import safe_keys
from mmpretrain.core.captions import captions_of
from mmpretrain.core.errors import ConfigError, DataError


def picture(kind: str = "JPEG", shade: int = 100) -> bytes:
    target = BytesIO()
    Image.linear_gradient("L").convert("RGB").point(lambda value: (value + shade) % 256).save(target, kind)
    return target.getvalue()


def write_table(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("image", "caption")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, f"{path.stem} {n}") for path in sorted(folder.iterdir()) for n in range(2)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        (folder / f"p{number}.jpg").write_bytes(picture(shade=number))
    return folder


@pytest.fixture
def table(tmp_path: Path, photos: Path) -> Path:
    return write_table(tmp_path / "captions.csv", rows_of(photos))


def read_back(out: Path) -> list[dict[str, object]]:
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def test_webdataset_reads_every_sample_back_with_all_captions(photos: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(photos, table, out, samples_per_shard=3, workers=1) == PackSummary(3, 7, 14, 0, 0)
    samples = read_back(out)
    assert [sample["__key__"] for sample in samples] == [f"p{number}" for number in range(7)]
    for number, sample in enumerate(samples):
        assert sample["jpg"] == (photos / f"p{number}.jpg").read_bytes()
        assert sample["txt"] == f"p{number} 0".encode()
        assert json.loads(sample["json"]) == {"captions": [f"p{number} 0", f"p{number} 1"], "file": f"p{number}.jpg"}
        assert captions_of({"json": sample["json"], "txt": sample["txt"]}) == [f"p{number} 0", f"p{number} 1"]
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]


def test_the_flickr_photos_give_ten_shards_of_a_hundred(shared_data: Path, tmp_path: Path) -> None:
    flickr, out = shared_data / "flickr1k", tmp_path / "out"
    summary = pack(flickr / "images", flickr / "captions.csv", out, samples_per_shard=100, workers=2)
    assert summary == PackSummary(shards=10, samples=1000, captions=5000, dropped=0, unlisted=0)
    samples = read_back(out)
    with (flickr / "captions.csv").open() as file:
        expected: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            expected.setdefault(row["image"], []).append(row["caption"].strip())
    found = {json.loads(sample["json"])["file"]: json.loads(sample["json"])["captions"] for sample in samples}
    assert found == expected
    assert all(sample["jpg"] == (flickr / "images" / f"{sample['__key__']}.jpg").read_bytes() for sample in samples)


def test_the_bytes_do_not_depend_on_the_workers(photos: Path, table: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        pack(photos, table, tmp_path / str(workers), samples_per_shard=2, workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in "12")
    assert one == two
    assert len(one) == 4


def test_an_index_stands_beside_each_shard_and_fits_it(photos: Path, table: Path, tmp_path: Path) -> None:
    pack(photos, table, tmp_path / "out", samples_per_shard=4, workers=1)
    for shard in (tmp_path / "out").glob("*.tar"):
        index = load_index(shard)
        assert index is not None
        assert index.facts.captions.tolist() == [2] * index.num_samples
        assert index.facts.width.tolist() == [256] * index.num_samples


def test_an_interrupted_packing_goes_on_where_it_stopped(photos: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (photos / "p0.jpg").write_bytes(b"")
    summary = pack(photos, table, out, samples_per_shard=2, workers=1, max_bad=0.5)
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".index"}
    untouched = (out / "00000.tar").stat().st_mtime_ns
    for name in ("00002.tar", "00003.tar"):
        (out / name).unlink()
        (out / f".{name}.unfinished").write_bytes(b"half a tar")
    with (out / "pack-report.jsonl").open("a") as report:
        report.write('{"path": "p5.jp')  # killed while it wrote
    assert pack(photos, table, out, samples_per_shard=2, workers=1, max_bad=0.5) == summary
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".index"} == whole
    assert (out / "00000.tar").stat().st_mtime_ns == untouched
    assert all(load_index(shard) is not None for shard in out.glob("*.tar"))


def test_another_packing_in_the_same_folder_is_refused(photos: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, table, out, samples_per_shard=2, workers=1)
    with pytest.raises(ConfigError, match=r"other input or options \(samples_per_shard 2 there, 3 now\); give another"):
        pack(photos, table, out, samples_per_shard=3, workers=1)
    write_table(table, [*rows_of(photos), ("p0.jpg", "one more")])
    with pytest.raises(ConfigError, match="other input or options .sha256 "):
        pack(photos, table, out, samples_per_shard=2, workers=1)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds shards that `data pack` did not write"):
        pack(photos, table, out, samples_per_shard=2, workers=1)


def test_the_extension_tells_what_the_content_is(tmp_path: Path) -> None:
    contents = {
        "a.jpg": ("png", picture("PNG")),
        "b.png": ("webp", picture("WEBP")),
        "c.jpeg": ("jpg", picture("JPEG")),
        "d.jpg": ("gif", picture("GIF")),
        "e.jpg": ("bmp", picture("BMP")),
        "f.jpg": ("tiff", picture("TIFF")),
        "g.wav": ("mp3", b"\xff\xfb\x90\x00" + bytes(413)),
        "h.mp3": ("mp3", b"ID3\x04" + bytes(60)),
        "i.mp3": ("wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)),
        "j.wav": ("flac", b"fLaC" + bytes(60)),
        "k.wav": ("ogg", b"OggS" + bytes(60)),
        "l.avi": ("mp4", b"\0\0\0\x20ftypisom" + bytes(40)),
        "m.mp4": ("webm", b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm" + bytes(40)),
        "n": ("mov", b"\0\0\0\x20ftypqt  " + bytes(40)),
    }
    folder = tmp_path / "media"
    folder.mkdir()
    for name, (_, content) in contents.items():
        (folder / name).write_bytes(content)
    table = write_table(tmp_path / "t.csv", [(name, "words") for name in contents])
    pack(folder, table, tmp_path / "out", workers=1)
    found = {json.loads(sample["json"])["file"]: sample for sample in read_back(tmp_path / "out")}
    for name, (extension, content) in contents.items():
        assert found[name].get(extension) == content, name


def test_real_clips_keep_their_kind(shared_data: Path, tmp_path: Path) -> None:
    clips = shared_data / "clips"
    names = sorted(path.name for path in clips.iterdir())
    pack(clips, write_table(tmp_path / "t.csv", [(name, "words") for name in names]), tmp_path / "out", workers=1)
    for sample in read_back(tmp_path / "out"):
        assert Path(json.loads(sample["json"])["file"]).suffix[1:] in sample


def test_what_cannot_be_used_is_listed_with_its_reason(photos: Path, table: Path, tmp_path: Path) -> None:
    (photos / "p1.jpg").write_bytes(picture()[:900])
    (photos / "p2.jpg").write_bytes(b"<!DOCTYPE html> not found")
    (photos / "p3.jpg").write_bytes(b"")
    (photos / "p4.jpg").unlink()
    (photos / "stray.jpg").write_bytes(picture())
    rows = [*rows_of(photos), ("p4.jpg", "gone"), ("../p9.jpg", "climbs"), ("p5.jpg", "")]
    rows = [row for row in rows if row[0] != "stray.jpg" and not (row[0] == "p5.jpg" and row[1])]
    write_table(table, rows)
    out = tmp_path / "out"
    summary = pack(photos, table, out, samples_per_shard=2, workers=1, max_bad=0.9)
    reasons = {row["path"]: row["reason"] for row in map(json.loads, (out / "pack-report.jsonl").open())}
    assert list(reasons) == ["../p9.jpg", "p1.jpg", "p2.jpg", "p3.jpg", "p4.jpg", "p5.jpg"]
    assert "leads out of" in reasons["../p9.jpg"]
    assert reasons["p1.jpg"].startswith("the image cannot be decoded: image file is truncated")
    assert reasons["p2.jpg"] == "its content is of no known media type; it begins with b'<!DOCTYPE html> '"
    assert reasons["p3.jpg"] == "the file is empty"
    assert "there is no such file" in reasons["p4.jpg"]
    assert reasons["p5.jpg"] == "no row gives it a caption"
    assert summary == PackSummary(shards=2, samples=2, captions=4, dropped=6, unlisted=1)
    assert (
        json.loads((out / "manifest.json").read_text()).items()
        >= {
            "complete": True,
            "samples": 2,
            "dropped": 6,
            "unlisted": 1,
        }.items()
    )
    assert [sample["__key__"] for sample in read_back(out)] == ["p0", "p6"]


def test_too_many_unusable_files_end_the_packing(photos: Path, table: Path, tmp_path: Path) -> None:
    (photos / "p1.jpg").write_bytes(b"nothing")
    with pytest.raises(
        DataError,
        match=r"1 of the 7 files that .*\.csv names cannot be used, more than --max-bad 0\.1: p1\.jpg",
    ):
        pack(photos, table, tmp_path / "out", workers=1, max_bad=0.1)
    assert pack(photos, table, tmp_path / "out", workers=1, max_bad=0.2).dropped == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tsv"])
def test_every_kind_of_table_gives_the_same_samples(photos: Path, table: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"file_name": f"p{n}.jpg", "text": [f"p{n} 0", f"p{n} 1"]} for n in range(7)]
    other = tmp_path / f"captions.{kind}"
    if kind == "jsonl":
        other.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), other)
    else:
        lines = ["file_name\ttext", *(f"{row['file_name']}\t{text}" for row in rows for text in row["text"])]
        other.write_text("\n".join(lines))
    pack(photos, table, tmp_path / "csv", workers=1)
    pack(photos, other, tmp_path / "other", workers=1)
    assert (tmp_path / "csv" / "00000.tar").read_bytes() == (tmp_path / "other" / "00000.tar").read_bytes()


def test_columns_are_named_where_they_cannot_be_told(photos: Path, tmp_path: Path) -> None:
    rows = [{"image": "p0.jpg", "path": "p0.jpg", "words": "a"}]
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps(rows[0]))
    with pytest.raises(ConfigError, match=r"several columns could be it \(image, path\); name .* with --image-column"):
        pack(photos, table, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"none of the columns \(image, path, words\) is it; .* --caption-column"):
        pack(photos, table, tmp_path / "out", image_column="image")
    with pytest.raises(ConfigError, match="--caption-column 'word': .* has no such column; it has image, path, words"):
        pack(photos, table, tmp_path / "out", image_column="image", caption_column="word")
    assert pack(photos, table, tmp_path / "out", 1, 1, "image", "words").samples == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "holds no rows"),
        ("t.csv", "image,caption\na.jpg,a,b\n", "row 1 has another number of columns than the header"),
        ("t.csv", 'image,caption\na.jpg,"open\n', "is no readable CSV"),
        ("t.csv", "image,caption\n,words\n", "row 1 names no file in column 'image': ''"),
        ("t.jsonl", '{"image": "a.jpg", "caption": "a"}\n{', "line 2 is not JSON"),
        ("t.jsonl", "[1]", "line 1 holds a list, not an object"),
        (
            "t.jsonl",
            '{"image": "a.jpg", "caption": 5}',
            "row 1, column 'caption': what stands there is neither text nor a list of text: 5",
        ),
        ("t.parquet", "x", "is no readable Parquet"),
    ],
)
def test_a_faulty_table_is_refused(photos: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        pack(photos, tmp_path / name, tmp_path / "out")


def test_faulty_arguments_are_refused(photos: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="media folder .*nowhere does not exist"):
        pack(tmp_path / "nowhere", table, tmp_path / "out")
    with pytest.raises(DataError, match="captions file .* does not exist"):
        pack(photos, tmp_path / "none.csv", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"t\.xlsx: \.xlsx is not read; give .csv, .tsv, .jsonl or .parquet"):
        pack(photos, write_table(tmp_path / "t.xlsx", []), tmp_path / "out")
    with pytest.raises(ConfigError, match="--samples-per-shard is 0; give at least 1"):
        pack(photos, table, tmp_path / "out", samples_per_shard=0)
    with pytest.raises(ConfigError, match="--max-bad is 5; give a fraction from 0 to 1"):
        pack(photos, table, tmp_path / "out", max_bad=5)
    with pytest.raises(ConfigError, match="workers is 0; give at least 1"):
        pack(photos, table, tmp_path / "out", workers=0)


def test_keys_are_safe_and_unique() -> None:
    paths = ["a.b.jpg", "a_b.jpg", "c/d.jpg", "e.jpg", "e.png", "größe 1.jpg"]
    keys = safe_keys(paths)
    assert keys[2:4] == ["c_d", keys[3]]
    assert keys[5] == "größe_1"
    assert len(set(keys)) == 6
    assert all("." not in key and "/" not in key for key in keys)
    assert safe_keys(paths[:2])[0] == keys[0] != "a_b"


def test_files_of_further_folders_join_the_sample_of_their_name(
    photos: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speech, out = tmp_path / "speech", tmp_path / "out"
    speech.mkdir()
    for number in range(5):
        (speech / f"p{number}.wav").write_bytes(b"ID3 sound of " + bytes([number]))  # MP3, whatever its name says
    summary = pack(photos, table, out, samples_per_shard=3, workers=1, join=[speech])
    assert (summary.samples, summary.joined) == (7, 5)
    assert "5 files of further folders joined them, 2 are lacking" in " ".join(capsys.readouterr().err.split())
    for number, sample in enumerate(read_back(out)):
        assert ("mp3" in sample) is (number < 5)
        assert "jpg" in sample and "wav" not in sample
        if number < 5:
            assert sample["mp3"] == b"ID3 sound of " + bytes([number])
    (speech / "p0.wav").write_bytes(b"ID3 another")
    with pytest.raises(ConfigError, match="holds a packing of other input or options"):
        pack(photos, table, out, samples_per_shard=3, workers=1, join=[speech])


def test_further_folders_that_cannot_join_are_refused(photos: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="media folder .*absent does not exist"):
        pack(photos, table, tmp_path / "a", workers=1, join=[tmp_path / "absent"])
    twice = tmp_path / "twice"
    twice.mkdir()
    with pytest.raises(DataError, match="of further media holds no files"):
        pack(photos, table, tmp_path / "b", workers=1, join=[twice])
    for suffix in ("mp3", "wav"):
        (twice / f"p1.{suffix}").write_bytes(b"ID3")
    with pytest.raises(DataError, match=r"p1.mp3 and .*p1.wav would join the same sample; keep one"):
        pack(photos, table, tmp_path / "c", workers=1, join=[twice])
    same = tmp_path / "same"
    same.mkdir()
    (same / "p1.png").write_bytes(picture(shade=3))
    with pytest.raises(DataError, match=r"p1.jpg: two of its files hold jpg, and a sample has one of each: p1.png"):
        pack(photos, table, tmp_path / "d", workers=1, join=[same])
