"""The synthetic set: deterministic, balanced, its held-out pairs never in training, its labels true to the pixels."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.make import make
from data_pipeline.preview import preview
from data_pipeline.shapes import COLOURS, HELD_OUT, PAIRS, PLACES, SHAPES
from data_pipeline.stats import Extension, stats
from mmpretrain.core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "set"
    assert make(out, samples=120, seed=3, samples_per_shard=50, workers=1) == {"train": 120, "val": 60, "heldout": 12}
    return out


def read(folder: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))


def described(folder: Path) -> list[dict[str, str]]:
    return [json.loads(sample["json"]) for sample in read(folder)]


def test_training_holds_thirty_pairs_evenly_and_the_six_others_stand_apart(synthetic: Path) -> None:
    colours = list(COLOURS)
    assert {(colours.index(colour) + SHAPES.index(shape)) % 6 for colour, shape in HELD_OUT} == {0}
    counts = {
        split: np.unique([row["label"] for row in described(synthetic / split)], return_counts=True)
        for split in ("train", "val", "heldout")
    }
    for split, number, each in (("train", 30, 4), ("val", 30, 2), ("heldout", 6, 2)):
        assert len(counts[split][0]) == number
        assert set(counts[split][1]) == {each}
    assert not set(counts["train"][0]) & set(counts["heldout"][0])
    assert set(counts["train"][0]) == set(counts["val"][0])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(synthetic: Path, tmp_path: Path) -> None:
    for seed, equal in ((3, True), (4, False)):
        out = tmp_path / str(seed)
        make(out, samples=120, seed=seed, samples_per_shard=50, workers=1 + equal)
        for shard in sorted(synthetic.glob("*/*.tar")):
            assert ((out / shard.parent.name / shard.name).read_bytes() == shard.read_bytes()) is equal


def test_every_caption_names_the_pair_and_differs_from_its_neighbours(synthetic: Path) -> None:
    for row in described(synthetic / "train"):
        assert len(set(row["captions"])) == 3
        for caption in row["captions"]:
            assert row["colour"] in caption
            assert row["shape"] in caption
            assert not [place for place in PLACES if place in caption.split() and place != row["place"]]


def test_pixels_show_what_the_label_says(synthetic: Path) -> None:
    """The most saturated pixels are nearest to the colour, and their middle stands at the place."""
    palette = np.array(list(COLOURS.values()), np.float64)
    for sample in read(synthetic / "train"):
        row = json.loads(sample["json"])
        pixels = np.asarray(Image.open(BytesIO(sample["jpg"])), np.float64)
        assert pixels.shape == (64, 64, 3)
        coloured = np.ptp(pixels, axis=-1) > 70
        mean = pixels[coloured].mean(axis=0)
        assert list(COLOURS)[int(np.linalg.norm(palette - mean, axis=1).argmin())] == row["colour"]
        middle = np.argwhere(coloured).mean(axis=0)[::-1] / 64
        distances = [np.linalg.norm(middle - place) for place in PLACES.values()]
        assert list(PLACES)[int(np.argmin(distances))] == row["place"]


def test_the_classes_are_all_pairs_in_the_form_of_zero_shot_evaluation(synthetic: Path) -> None:
    classes = json.loads((synthetic / "classes.json").read_text())
    assert classes["classes"] == [f"{colour} {shape}" for colour, shape in PAIRS]
    assert len(set(classes["classes"])) == 36
    assert all("{}" in template for template in classes["templates"])
    assert all(row[classes["label_key"]] in classes["classes"] for row in described(synthetic / "heldout"))


def test_made_again_it_is_kept_and_other_options_are_refused(synthetic: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in synthetic.glob("*/*.tar")}
    make(synthetic, samples=120, seed=3, samples_per_shard=50, workers=1)
    assert {path: path.stat().st_mtime_ns for path in synthetic.glob("*/*.tar")} == before
    with pytest.raises(ConfigError, match="holds a set made with .*'seed': 3.*; give another folder"):
        make(synthetic, samples=120, seed=5, samples_per_shard=50)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds files that `data make` did not write"):
        make(tmp_path, samples=120)
    with pytest.raises(ConfigError, match="--samples 0, .* give at least 1 sample"):
        make(tmp_path / "new", samples=0)


def test_the_statistics_are_those_of_the_samples(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stats([str(synthetic / "train")], workers=1)
    rows, samples = described(synthetic / "train"), read(synthetic / "train")
    longest = [max(map(len, row["captions"])) for row in rows]
    assert (found.shards, found.samples, found.captions) == (3, 120, 360)
    assert found.width == found.height == (64,) * 5
    assert found.captions_per_sample == (3,) * 5
    assert (found.characters[0], found.characters[-1]) == (min(longest), max(longest))
    assert found.extensions["jpg"] == Extension(120, sum(len(sample["jpg"]) for sample in samples))
    assert list(found.extensions) == ["jpg", "json", "mp4", "txt", "wav"]
    assert "3 shards, 120 samples, 360 captions" in capsys.readouterr().out


def test_the_contact_sheet_shows_images_and_captions_unclipped(synthetic: Path, tmp_path: Path) -> None:
    sheet = Image.open(preview([str(synthetic / "train")], tmp_path / "deep" / "sheet.png", samples=6, columns=3))
    pixels = np.asarray(sheet.convert("RGB"))
    assert sheet.size[0] == 14 + 3 * (240 + 14)
    border = np.concatenate([pixels[:8].ravel(), pixels[-4:].ravel(), pixels[:, :8].ravel(), pixels[:, -8:].ravel()])
    assert (border == 255).all()
    assert (pixels[14 + 240 + 14 :, :].min(axis=-1) < 100).any()


def test_a_sheet_draws_broken_images_as_tiles_and_wraps_long_words(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "k" * 90, "jpg": b"broken", "txt": "w" * 500})
        writer.write({"__key__": "bare", "jpg": b"broken"})
        writer.write({"__key__": "odd", "jpg": b"broken", "json": b"{"})
        writer.write({"__key__": "many", "jpg": b"", "json": json.dumps({"captions": ["a word"] * 40}).encode()})
    sheet = np.asarray(Image.open(preview([str(tmp_path / "s.tar")], tmp_path / "s.png")).convert("RGB"))
    for column in range(1, 4):  # the gaps between tiles stay free
        left = column * 254
        assert (sheet[:, left + 2 : left + 12] == 255).all()


def test_a_sheet_without_images_or_with_odd_options_is_refused(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "a", "txt": "words"})
    with pytest.raises(DataError, match="no sample of the 1 shards holds an image"):
        preview([str(tmp_path)], tmp_path / "s.png")
    with pytest.raises(ConfigError, match="--samples 0 and --columns 5 must be at least 1"):
        preview([str(tmp_path)], tmp_path / "s.png", samples=0)
