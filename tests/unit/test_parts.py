"""Work divided over tasks: all parts together are the whole, in any order, repeated or not."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.indexing import index_shards
from data_pipeline.make import make
from data_pipeline.pack import REPORT, pack
from data_pipeline.part import parse_part
from mmpretrain.core.errors import ConfigError


def photos(folder: Path) -> tuple[Path, Path]:
    """Seven pictures, one of them broken, and their captions."""
    (folder / "photos").mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(7):
            rows.writerow([f"{number}.png", f"number {number}"])
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "4.png").write_bytes(b"no picture")
    return folder / "photos", folder / "captions.csv"


def contents(folder: Path) -> dict[str, bytes]:
    """Of all but the indexes, which hold when their shards were written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".index"}


def test_parts_in_any_order_and_repeated_pack_the_very_bytes_of_one_packing(tmp_path: Path) -> None:
    media, table = photos(tmp_path)
    options = {"samples_per_shard": 2, "workers": 1, "max_bad": 0.5}
    pack(media, table, tmp_path / "whole", **options)  # type: ignore[arg-type]
    for text in ("2/3", "0/3", "2/3", "1/3"):
        assert pack(media, table, tmp_path / "parts", **options, part=parse_part(text)) is None  # type: ignore[arg-type]
    summary = pack(media, table, tmp_path / "parts", **options)  # type: ignore[arg-type]
    assert summary is not None and (summary.shards, summary.samples, summary.dropped) == (4, 6, 1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert '"4.png"' in (tmp_path / "parts" / REPORT).read_text()


def test_parts_index_each_shard_once(tmp_path: Path) -> None:
    make(tmp_path, samples=50, image_size=24, samples_per_shard=10, workers=1)
    indexes = list((tmp_path / "train").glob("*.index"))
    for index in indexes:
        index.unlink()
    counts = [index_shards([str(tmp_path / "train")], workers=1, part=parse_part(f"{n}/2")).shards for n in range(2)]
    assert counts == [3, 2]
    assert sorted((tmp_path / "train").glob("*.index")) == sorted(indexes)


@pytest.mark.parametrize("text", ["3", "3/3", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--part is '{text}'; write NUMBER/OF with numbers from 0"):
        parse_part(text)
