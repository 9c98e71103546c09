"""A loaded model in Python: every form of input, embeddings, classes, heads, and what it refuses."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from media import counting_frames, recording, tone, video
from PIL import ExifTags, Image
from published_model import CLASSES, FRAMES, IMAGE_SIZE, RATE, picture
from transformers import AutoModel, AutoProcessor

from mmpretrain.core.errors import CheckpointError, ConfigError, DataError
from mmpretrain.inference import Model, Processor, load


@pytest.fixture(scope="module")
def model(tiny_published: Path) -> Model:
    return load(tiny_published, device="cpu")


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "red.png"
    picture((200, 30, 0)).save(path)
    return path


def test_a_picture_is_the_same_in_every_form(model: Model, red: Path) -> None:
    with Image.open(red) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        forms = [str(red), red, red.read_bytes(), opened, pixels]
        fields, vectors = model.processor(image=forms)["image"], model.embed(image=forms)["image"]
    assert vectors.shape == (5, 32)
    assert torch.equal(fields, fields[:1].expand(5, -1, -1, -1))
    torch.testing.assert_close(vectors, vectors[:1].expand(5, -1), rtol=0, atol=1e-6)  # kernels see rows by their place
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_an_opened_photo_is_that_of_its_file(model: Model, tmp_path: Path) -> None:
    """Turned by EXIF, and in 16 bits of either byte order."""
    ramp = np.add.outer(np.arange(48) * 600, np.arange(64) * 400).astype(np.uint16)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.frombytes("I;16B", (64, 48), ramp.astype(">u2").tobytes()).save(tmp_path / "deep.tif")
    for name in ("turned.jpg", "deep.png", "deep.tif"):
        with Image.open(tmp_path / name) as opened:
            of_file, of_image = model.processor(image=[tmp_path / name, opened])["image"]
        assert torch.equal(of_file, of_image), name


def test_sound_is_the_same_as_a_file_and_as_samples(model: Model, tmp_path: Path) -> None:
    samples = np.rint(tone(0.7, RATE) * 32767).astype(np.int16)
    (tmp_path / "tone").write_bytes(recording(samples, RATE))
    floats = samples.astype(np.float32) / 32768
    fields = model.processor(audio=[tmp_path / "tone", (samples, RATE), (floats, RATE)])["audio"]
    assert torch.equal(fields[0], fields[1])
    assert torch.equal(fields[0], fields[2])


def test_frames_reach_the_tower_without_loss(model: Model) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for rate in (8, Fraction(30000, 1001), np.float32(8.0)):
        fields = model.processor(video=(frames, rate))
        assert np.array_equal(fields["video"][0].numpy(), frames.transpose(0, 3, 1, 2))
    lossy = model.embed(video=video(counting_frames(12)))["video"]
    assert lossy.shape == (1, 32)


def test_the_library_around_it_loads_model_and_processor_alike(model: Model, tiny_published: Path, red: Path) -> None:
    network, processor = AutoModel.from_pretrained(tiny_published).eval(), AutoProcessor.from_pretrained(tiny_published)
    assert isinstance(processor, Processor)
    fields = processor(image=[red], text=["a red square"])
    ours = model.embed(image=red, text="a red square")
    with torch.no_grad():
        assert torch.equal(network.embed("image", fields["image"]), ours["image"])
        assert torch.equal(network.embed("text", fields["text"], fields["text.mask"]), ours["text"])
    assert processor.configs["audio"].model_dump()["source"] == "file"


def test_loading_a_published_model_imports_nothing_of_training(tiny_published: Path) -> None:
    script = (
        "import sys\nfrom mmpretrain.inference import load\n"
        f"print(load({str(tiny_published)!r}, 'cpu').fingerprint)\n"
        "assert not {'deepspeed', 'mmpretrain.training'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load(tiny_published, "cpu").fingerprint


def test_the_fingerprint_changes_with_a_weight_and_with_a_codec(tiny_published: Path) -> None:
    first, second, third = (load(tiny_published, "cpu") for _ in range(3))
    with torch.no_grad():
        second.network.projections["audio"].weight[0, 0] += 1e-3
    other = third.processor.configs["audio"].model_copy(update={"segment": "first"})
    third.processor.configs["audio"] = other
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_zero_shot_scores_are_cosines_with_the_mean_of_the_prompts(model: Model, red: Path) -> None:
    templates = ["a {}", "a red {} and a blue {}"]
    scores = model.classify(["square", "circle"], templates, image=[red])
    prompts = [template.replace("{}", name) for name in ("square", "circle") for template in templates]
    words = model.embed(text=prompts)["text"].numpy().reshape(2, 2, -1).mean(axis=1)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    expected = model.embed(image=red)["image"].numpy() @ words.T
    np.testing.assert_allclose(scores.values.numpy(), expected, rtol=0, atol=1e-6)
    assert scores.top()[0][0][0] == ("square", "circle")[int(expected.argmax())]


def test_a_head_names_its_classes_and_takes_rows_that_lack_a_modality(model: Model, red: Path) -> None:
    sound = (tone(1.0, RATE), RATE)
    scores = model.predict("animal", image=[red, red], text=["a dog", "a dog"], audio=[sound, None])
    assert scores.names == CLASSES
    torch.testing.assert_close(scores.values.sum(dim=1), torch.ones(2))
    fields = model.processor(image=red, text="a dog", audio=(tone(1.0, RATE, 900), RATE))
    fields |= {f"{name}.present": torch.tensor([name != "audio"]) for name in ("image", "text", "audio")}
    with torch.no_grad():
        logits = model.network.objectives["animal"].predict(model.network.encoder(fields))
    torch.testing.assert_close(scores.values[1:], logits.softmax(1))
    assert (scores.values[0] - scores.values[1]).abs().max() > 1e-4


def test_tags_are_probabilities_of_their_own(model: Model) -> None:
    scores = model.predict("tags", video=video(counting_frames(8)))
    assert scores.meaning == "probability"
    assert scores.names == ("0", "1")
    assert ((scores.values > 0) & (scores.values < 1)).all()


def test_inputs_that_cannot_be_used_are_named(model: Model, red: Path, tmp_path: Path) -> None:
    sound = recording(tone(0.1, RATE), RATE)
    gone = tmp_path / "gone.jpg"
    for inputs, message in (
        ({"smell": [b""]}, "the model has no tower for 'smell'; it reads audio, image, text, video"),
        ({"image": [red, gone]}, r"image input 1 \(.*gone.jpg\): .*gone.jpg cannot be read: No such file"),
        (
            {"image": b"not a picture"},
            "image input 0: its content is of no known media type; it begins with b'not a pi'",
        ),
        ({"image": sound}, r"image input 0: no image member \(saw: wav\)"),
        ({"image": np.zeros((4, 4), np.float32)}, r"pixels are float32 \[4, 4\], expected uint8 \[height, width, 3\]"),
        ({"audio": (np.zeros((4, 4, 4), np.int16), 8)}, r"values with a rate are int16 \[4, 4, 4\], expected samples"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, r"pixels are uint8 \[0, 4, 3\], expected uint8"),
        ({"image": Image.new("F", (4, 4))}, r"pixels of 32 bits \(mode F\), whose range is not known"),
        ({"audio": (np.zeros((2, 800), np.int16), 8)}, r"samples are \[2, 800\], expected \[N, channels\]; transpose"),
        ({"audio": (np.zeros(800, np.int16), 0)}, "the rate is 0, expected samples or frames per second"),
        ({"video": (np.zeros((2, 8, 8, 3), np.uint8), float("nan"))}, "the rate is nan, expected samples"),
        ({"image": 3}, "saw int, expected a path, bytes, an image"),
        ({"text": 3}, "text input 0: saw int, expected text"),
        ({"text": " "}, "text input 0: the text is blank"),
        ({"image": []}, "there are no inputs; give at least one"),
    ):
        with pytest.raises(DataError, match=message):
            model.embed(**inputs)


def test_questions_that_the_model_cannot_answer_are_refused(model: Model, red: Path) -> None:
    with pytest.raises(ConfigError, match=r"has several heads \(animal, tags\); choose one by its objective"):
        model.predict(image=[red])
    with pytest.raises(ConfigError, match="no supervised objective 'mood'; it has animal, tags"):
        model.predict("mood", image=[red])
    with pytest.raises(ConfigError, match="objective tags reads video, not image"):
        model.predict("tags", image=[red])
    with pytest.raises(DataError, match="give as many of each modality"):
        model.predict("animal", image=[red], text=["a", "b"])
    with pytest.raises(DataError, match="there are no inputs; give at least one"):
        model.predict("animal", image=[])
    with pytest.raises(ConfigError, match="classes are 'cat, dog', one text; give a list of names"):
        model.classify("cat, dog", image=red)
    with pytest.raises(ConfigError, match="classify those of one modality"):
        model.classify(["cat"], image=red, text="a")
    with pytest.raises(DataError, match="each template needs a {} for the class name"):
        model.classify(["cat"], ["a photo"], image=red)


def test_what_is_no_model_is_refused(tmp_path: Path, tiny_published: Path) -> None:
    with pytest.raises(CheckpointError, match="none is not there; name a published folder, a run folder"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds none of them; name a published folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="holds a model of type 'clip', which its own library loads"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_published / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="the weights of .* cannot be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_published / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no processor.json.*publish the run again"):
        load(tmp_path)
    (tmp_path / "processor.json").write_text('{"codecs": {"image": {"kind": "image"}}}')
    with pytest.raises(CheckpointError, match="no codec was saved for audio, text, video, which the model reads"):
        load(tmp_path)
    (tmp_path / "processor.json").write_text('{"codecs": {"image": {"kind": "smell"}}}')
    with pytest.raises(CheckpointError, match="does not describe codecs that this version knows"):
        load(tmp_path)
