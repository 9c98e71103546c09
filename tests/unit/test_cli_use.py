"""`embed`, `search` and `classify` as a user calls them: files, shards and texts in, tables and pictures out."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from media import counting_frames, recording, tone, video
from PIL import Image
from published_model import CLASSES, RATE, picture, write_unverified

from mmpretrain.cli import main
from mmpretrain.core.errors import ConfigError
from mmpretrain.inference import Model, load
from mmpretrain.inference.embedding import embed
from mmpretrain.inference.inputs import open_inputs
from mmpretrain.inference.store import read_embeddings


def run(*arguments: object) -> int:
    """Exit code of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def model(tiny_published: Path) -> Model:
    return load(tiny_published, device="cpu")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, a sound, a clip, a note and a picture that is cut off, told apart by content alone."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "deeper").mkdir()
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250)), ("deeper/green", (0, 250, 0))):
        picture(colour).save(folder / f"{name}.jpg", "PNG")
    (folder / "tone.bin").write_bytes(recording(tone(0.5, RATE), RATE))
    (folder / "clip.mp4").write_bytes(video(counting_frames(8)))
    (folder / "notes.md").write_text("no media")
    content = (folder / "red.jpg").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture(scope="module")
def embedded(tiny_published: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "media.parquet"
    assert run("embed", tiny_published, media, "--out", out, "--max-bad", 0.5, "--batch", 2) == 0
    return out


def test_a_folder_is_embedded_by_content_and_the_broken_file_is_listed(
    model: Model, media: Path, embedded: Path
) -> None:
    found = read_embeddings(embedded)
    assert [(row.key, row.modality) for row in found.rows] == [
        ("blue.jpg", "image"),
        ("clip.mp4", "video"),
        ("deeper/green.jpg", "image"),
        ("red.jpg", "image"),
        ("tone.bin", "audio"),
    ]
    for row, vector in zip(found.rows, found.vectors, strict=True):
        expected = model.embed(**{row.modality: media / row.key})[row.modality][0].numpy()
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-6)
        assert row.path == str(media / row.key)
    (broken,) = map(json.loads, embedded.with_name("media.broken.jsonl").read_text().splitlines())
    assert broken["key"] == "cut.png"
    assert "image: the image cannot be decoded" in broken["reason"]
    assert sorted(path.name for path in embedded.parent.iterdir()) == ["media.broken.jsonl", "media.parquet"]


def test_a_clip_without_sound_is_not_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, clips = write_unverified(tmp_path, "audio"), tmp_path / "clips"
    saved = model / "processor.json"
    saved.write_text(saved.read_text().replace('"source": "file"', '"source": "either"'))
    clips.mkdir()
    capsys.readouterr()
    (clips / "loud.mp4").write_bytes(video(counting_frames(8), sound=tone(0.3, RATE)))
    (clips / "silent.mp4").write_bytes(video(counting_frames(8)))
    assert run("embed", model, clips, "--out", tmp_path / "out.parquet", "--strict") == 0
    assert [row.key for row in read_embeddings(tmp_path / "out.parquet").rows] == ["loud.mp4"]
    assert capsys.readouterr().err == "1 samples hold nothing that was asked for\n"


def test_too_many_broken_files_exit_3_after_all_others_are_embedded(
    tiny_published: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images"
    assert run("embed", tiny_published, media, "--out", out, "--strict", "--modality", "image", "--format", "npy") == 3
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "3 image vectors"
    errors = captured.err.splitlines()
    assert errors[0] == "3 samples hold nothing that was asked for"
    assert errors[2] == f"1 samples could not be used, all listed in {tmp_path / 'images.broken.jsonl'}"
    assert errors[3].startswith(
        "error: 1 of 7 samples could not be used, more than the 0.0% allowed; the first is cut.png"
    )
    assert np.load(out / "vectors.npy").shape == (3, 32)
    assert [row.key for row in read_embeddings(out).rows] == ["blue.jpg", "deeper/green.jpg", "red.jpg"]


def write_shard(path: Path) -> Path:
    """Two samples with picture, captions and sound, one without sound, one whose picture is broken."""
    path.parent.mkdir(parents=True)
    buffer = io.BytesIO()
    picture((200, 10, 10)).save(buffer, "PNG")
    captions = json.dumps({"captions": ["a red square", "a dog"]}).encode()
    sound = recording(tone(0.4, RATE), RATE)
    samples = [
        ("a", {"png": buffer.getvalue(), "json": captions, "wav": sound}),
        ("b", {"png": buffer.getvalue(), "json": captions}),
        ("c", {"png": b"\x89PNG\r\n\x1a\n broken", "json": captions, "wav": sound}),
    ]
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_are_embedded_in_all_modalities_at_once_and_found_again(
    tiny_published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "shards" / "00000.tar")
    out, sheet = tmp_path / "all.parquet", tmp_path / "sheet.png"
    assert run("embed", tiny_published, shard.parent, "--out", out, "--max-bad", 1) == 0
    rows = pyarrow.parquet.read_table(out, columns=["key", "ordinal", "modality", "text"]).to_pylist()
    assert [(row["key"], row["modality"], row["text"]) for row in rows] == [
        ("a", "audio", None),
        ("a", "image", None),
        ("a", "text", "a red square"),
        ("a", "text", "a dog"),
        ("b", "image", None),
        ("b", "text", "a red square"),
        ("b", "text", "a dog"),
        ("c", "audio", None),
        ("c", "text", "a red square"),
        ("c", "text", "a dog"),
    ]
    assert [row["ordinal"] for row in rows] == [0] * 4 + [1] * 3 + [2] * 3
    capsys.readouterr()
    assert (
        run("search", tiny_published, out, "--text", "a dog", "--modality", "text", "--sheet", sheet, "--top", 4) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:4] for line in lines[1:4]]
    assert [row[:3] for row in found] == [[str(n), "1.0000", "text"] for n in (1, 2, 3)]
    assert sorted(row[3] for row in found) == ["a", "b", "c"], "which text is first is for the last bits to say"
    with Image.open(sheet) as drawn:
        assert drawn.width > 5 * 240


def test_texts_of_a_table_are_embedded_and_blank_ones_are_broken(
    tiny_published: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "texts.csv", tmp_path / "texts.parquet"
    table.write_text("id,caption\nx,a red square\ny, \nz,a dog\n")
    assert run("embed", tiny_published, table, "--out", tmp_path / "texts.npy") == 2
    assert "texts.npy would hold Parquet; end its name in .parquet, or take --format npy" in capsys.readouterr().err
    assert run("embed", tiny_published, table, "--out", out) == 3
    assert "broken: y: the text is blank" in capsys.readouterr().err
    found = read_embeddings(out)
    assert [(row.key, row.text) for row in found.rows] == [("x", "a red square"), ("z", "a dog")]
    np.testing.assert_allclose(found.vectors, model.embed(text=["a red square", "a dog"])["text"], rtol=0, atol=1e-6)


def test_long_texts_and_brackets_are_shown_whole_in_a_pipe(
    tiny_published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "texts.jsonl", tmp_path / "texts.parquet"
    text = f"a [red] square {'and a blue circle ' * 20}end"
    table.write_text(json.dumps({"key": "[b]x", "text": text}) + "\n")
    assert run("embed", tiny_published, table, "--out", out) == 0
    capsys.readouterr()
    assert run("search", tiny_published, out, "--text", text) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.rstrip().split(maxsplit=4) == ["1", "1.0000", "text", "[b]x", text]


@pytest.mark.parametrize("kind", ["text", "image", "audio", "video"])
def test_a_query_of_any_modality_finds_the_nearest_rows(
    kind: str, tiny_published: Path, model: Model, media: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = {"text": "a dog", "image": media / "red.jpg", "audio": media / "tone.bin", "video": media / "clip.mp4"}
    assert run("search", tiny_published, embedded, f"--{kind}", queries[kind], "--top", 3) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    found = read_embeddings(embedded)
    scores = found.vectors @ model.embed(**{kind: queries[kind]})[kind][0].numpy()
    best = np.argsort(-scores)[:3]
    assert [line[3] for line in shown] == [found.rows[n].key for n in best]
    assert [float(line[1]) for line in shown] == pytest.approx(scores[best], abs=1e-4)
    if kind != "text":
        assert shown[0][1:] == ["1.0000", kind, queries[kind].name]


def test_a_sheet_shows_pictures_sounds_clips_and_what_has_gone(
    tiny_published: Path, media: Path, tmp_path: Path
) -> None:
    folder, out, sheet = tmp_path / "media", tmp_path / "all.parquet", tmp_path / "sheet.png"
    folder.mkdir()
    for name in ("red.jpg", "blue.jpg", "tone.bin", "clip.mp4"):
        (folder / name).write_bytes((media / name).read_bytes())
    assert run("embed", tiny_published, folder, "--out", out) == 0
    (folder / "blue.jpg").unlink()
    assert run("search", tiny_published, out, "--image", media / "red.jpg", "--sheet", sheet) == 0
    with Image.open(sheet) as drawn:
        pixels = np.asarray(drawn)
    assert (pixels == (250, 0, 0)).all(axis=2).any() or ((pixels[..., 0] > 240) & (pixels[..., 1] < 10)).any()


def test_an_interrupted_call_goes_on_and_gives_the_same_file(
    tiny_published: Path, media: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmpretrain.inference.embedding.PART_SAMPLES", 2)
    out, parts = tmp_path / "media.parquet", tmp_path / ".media.parquet.parts"
    model, inputs, calls = load(tiny_published, "cpu"), open_inputs(str(media)), list[int]()

    def stop_at_the_second(_module: object, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.network.projections["image"].register_forward_pre_hook(stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed(model, inputs, str(media), out)
    assert [path.name for path in parts.glob("*.parquet")] == ["000000.parquet"]
    assert not out.exists()
    with pytest.raises(ConfigError, match="holds parts of an interrupted call with another model, other inputs"):
        embed(model, inputs, str(media), out, ["image"])
    embed(model, inputs, str(media), out)
    handle.remove()
    assert len(calls) == 4, "the first part, with one picture, was embedded again"
    first, second = read_embeddings(embedded), read_embeddings(out)
    assert first.rows == second.rows
    np.testing.assert_allclose(first.vectors, second.vectors, rtol=0, atol=1e-6)
    assert not parts.exists()


def test_embeddings_of_another_model_are_refused(
    embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_unverified(tmp_path, "image", "text")
    assert run("search", other, embedded, "--text", "a dog") == 3
    error = capsys.readouterr().err
    assert "vectors of different models cannot be compared: embed the input again with this one" in error
    assert run("search", other, embedded, "--audio", "x.wav") == 3
    assert run("classify", other, tmp_path) == 2
    assert "was trained with no supervised objective, so it has no classes of its own" in capsys.readouterr().err


def test_zero_shot_classes_are_written_for_every_picture(
    tiny_published: Path, model: Model, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.csv"
    arguments = ["classify", tiny_published, media, "--classes", "square, circle", "--modality", "image"]
    assert run(*arguments, "--template", "a red {}", "--out", out, "--max-bad", 0.5) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == ["blue.jpg", "deeper/green.jpg", "red.jpg"]
    expected = model.classify(["square", "circle"], ["a red {}"], image=[media / row["key"] for row in rows])
    for row, ((first, score), (second, _)) in zip(rows, expected.top(2), strict=True):
        assert (row["class_1"], row["class_2"]) == (first, second)
        assert float(row["cosine_1"]) == pytest.approx(score, abs=1e-5)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": ["square"], "templates": ["a {}"]}))
    capsys.readouterr()
    assert run("classify", tiny_published, media / "red.jpg", "--classes", classes, "--modality", "image") == 0
    assert "square" in capsys.readouterr().out


def test_a_trained_head_joins_files_of_one_name_and_takes_samples_that_lack_some(
    tiny_published: Path, model: Model, tmp_path: Path
) -> None:
    folder, out = tmp_path / "samples", tmp_path / "answers.csv"
    folder.mkdir()
    for name in ("one", "two"):
        picture((200, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a dog")
    (folder / "one.wav").write_bytes(recording(tone(0.4, RATE), RATE))
    assert run("classify", tiny_published, folder, "--objective", "animal", "--top", 1, "--out", out) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sounds = [folder / "one.wav", None]
    images = [folder / "one.png", folder / "two.png"]
    expected = model.predict("animal", image=images, text=["a dog", "a dog"], audio=sounds)
    assert [row["key"] for row in rows] == ["one", "two"]
    assert [row["class_1"] for row in rows] == [CLASSES[n] for n in expected.values.argmax(1).tolist()]
    assert float(rows[1]["probability_1"]) == pytest.approx(expected.values[1].max().item(), abs=1e-5)


def test_what_cannot_be_done_is_said(
    tiny_published: Path, media: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, texts, odd = tmp_path / "empty", tmp_path / "t.csv", tmp_path / "odd.csv"
    empty.mkdir()
    texts.write_text("caption\n")
    odd.write_text("x,y\n1,2\n")
    only = tmp_path / "only"
    only.mkdir()
    (only / "notes.md").write_text("no media")
    new = tmp_path / "new.parquet"
    junk = tmp_path / "junk.parquet"
    junk.write_bytes(b"junk")
    make, search = ("embed", tiny_published), ("search", tiny_published)
    classify = ("classify", tiny_published)
    for arguments, code, message in (
        ((*make, media, "--out", embedded), 2, "exists; remove it, or write the embeddings elsewhere"),
        ((*make, media, "--out", new, "--modality", "smell"), 3, "no tower for 'smell'; it reads audio, image"),
        ((*make, empty, "--out", new), 3, "holds no files; name a folder of media, shards or a table of texts"),
        ((*make, tmp_path / "none", "--out", new), 3, "nothing there; check the path"),
        ((*make, only, "--out", new), 3, "holds nothing of audio, image, video that can be embedded"),
        ((*make, texts, "--out", new), 3, "holds no rows; it needs a column of texts"),
        ((*make, odd, "--out", new), 2, "none of the columns (x, y) is it; name the right one with --text-column"),
        ((*search, embedded), 2, "give one query: --text, --image, --audio or --video"),
        ((*search, embedded, "--text", "a", "--image", "b"), 2, "give one query"),
        ((*search, tmp_path / "none", "--text", "a"), 3, "holds no embeddings; make some with"),
        ((*search, junk, "--text", "a"), 3, "is no file of embeddings that `mmpretrain embed` wrote"),
        ((*search, embedded, "--text", "a", "--modality", "text"), 3, "no row is of text; the embeddings hold audio"),
        ((*search, embedded, "--image", tmp_path / "no.jpg"), 3, "cannot be read: No such file or directory"),
        ((*classify, media, "--classes", "a,b"), 2, "the model reads audio, image, video; choose one with --modality"),
        ((*classify, media, "--classes", "a,a"), 3, "--classes: class names must be present and distinct"),
        ((*classify, media, "--classes", "a", "--objective", "b"), 2, "give one of both"),
        ((*classify, media, "--template", "a {}"), 2, "name --classes too"),
        ((*classify, media), 2, "has several heads (animal, tags); choose one by its objective"),
        ((*classify, only, "--objective", "tags"), 3, "the input holds nothing of video to classify"),
        (("embed", empty, media, "--out", new), 5, "holds none of them; name a published folder, a run folder"),
    ):
        assert run(*arguments) == code, arguments
        assert message in capsys.readouterr().err, arguments
    assert not new.exists()
