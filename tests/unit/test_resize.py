"""Images that are packed smaller: like Pillow's own resize, upright, and nothing else is touched."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from test_pack import write_table

from data_pipeline.pack import pack
from data_pipeline.resize import Resize, shrink
from mmpretrain.core.errors import ConfigError


def picture(width: int, height: int, kind: str = "JPEG", turned: int = 1) -> bytes:
    """Waves of several directions and colours."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(13 * y), np.sin(5 * x * y + 1)], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = turned
    target = BytesIO()
    Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(
        target, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})
    )
    return target.getvalue()


def psnr(left: Image.Image, right: Image.Image) -> float:
    difference = np.asarray(left, np.float64) - np.asarray(right, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(640, 400, (102, 64)), (150, 320, (64, 137)), (65, 65, (64, 64))]
)
def test_the_shorter_side_gets_the_length_and_the_picture_stays_the_same(
    width: int, height: int, size: tuple[int, int]
) -> None:
    content = picture(width, height)
    made = shrink(content, Resize(64, 95))
    assert made is not None and (made.width, made.height) == (width, height)
    small = Image.open(BytesIO(made.content))
    assert (small.format, small.size) == ("JPEG", size)
    reference = Image.open(BytesIO(content)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    assert psnr(small, reference) > 35


def test_a_turned_picture_is_stored_upright() -> None:
    made = shrink(picture(300, 200, turned=6), Resize(50, 90))
    assert made is not None and (made.width, made.height) == (200, 300)
    small = Image.open(BytesIO(made.content))
    assert small.size == (50, 75) and not small.getexif()


def test_quality_decides_the_bytes() -> None:
    sizes = []
    for quality in (40, 90):
        made = shrink(picture(600, 600), Resize(256, quality))
        assert made is not None
        sizes.append(len(made.content))
    assert 1.5 * sizes[0] < sizes[1]


def test_smaller_pictures_stay_byte_for_byte_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    contents = {"a": picture(200, 100), "b": picture(90, 40), "c": picture(64, 64, "PNG"), "d": picture(70, 300, "PNG")}
    for name, content in contents.items():
        (photos / f"{name}.bin").write_bytes(content)
    table = write_table(tmp_path / "t.csv", [(f"{name}.bin", "words") for name in contents])
    summary = pack(photos, table, tmp_path / "out", workers=1, resize=64)
    assert summary is not None and (summary.samples, summary.smaller) == (4, 1)
    assert "1 images were smaller than --resize and stand as they were" in " ".join(capsys.readouterr().err.split())
    samples = {s["__key__"]: s for s in webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False)}
    assert samples["b"]["jpg"] == contents["b"] and samples["c"]["png"] == contents["c"]
    sizes = {name: Image.open(BytesIO(samples[name]["jpg"])).size for name in "ad"}
    assert sizes == {"a": (128, 64), "d": (64, 274)}
    described = {name: json.loads(sample["json"]).get("original_size") for name, sample in samples.items()}
    assert described == {"a": [200, 100], "b": None, "c": None, "d": [70, 300]}
    with pytest.raises(ConfigError, match=r"other input or options \(quality 90 there, 80 now\)"):
        pack(photos, table, tmp_path / "out", workers=1, resize=64, quality=80)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resize": 0}, "--resize is 0; give the pixels"), ({"quality": 100}, "--quality is 100; give 1")],
)
def test_sizes_and_qualities_that_make_no_picture_are_refused(
    tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(tmp_path, tmp_path / "t.csv", tmp_path / "out", **options)  # type: ignore[arg-type]
