"""The synthetic media hold what their labels say, in real containers, and the answer needs all four modalities."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.clips import FRAMES, MOTIONS
from data_pipeline.make import make
from data_pipeline.scenes import ANSWERS, QUESTIONS
from data_pipeline.shapes import COLOURS, HELD_OUT, SEEN
from data_pipeline.tones import PITCHES, SAMPLE_RATE
from mmpretrain.core.audio_bytes import AudioLimits
from mmpretrain.core.audio_bytes import read_header as read_sound
from mmpretrain.core.media_types import sniff
from mmpretrain.core.video_bytes import VideoLimits, open_video

Sample = dict[str, bytes]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    out = tmp_path_factory.mktemp("made") / "set"
    make(out, samples=120, seed=5, workers=1)
    return {split: read(out / split) for split in ("train", "heldout")}


def read(folder: Path) -> list[Sample]:
    return list(webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))


def test_members_are_what_their_names_say(samples: dict[str, list[Sample]]) -> None:
    for sample in samples["train"][:10]:
        for extension in ("jpg", "mp4", "wav"):
            assert sniff(sample[extension]) == extension


def test_a_video_shows_its_colour_and_moves_as_its_label_says(samples: dict[str, list[Sample]]) -> None:
    palette = np.array(list(COLOURS.values()), np.float64)
    for sample in samples["train"][:60]:
        clip = json.loads(sample["json"])["video"]
        with open_video(sample["mp4"], VideoLimits(10_000, 5.0, 100)) as video:
            assert (video.num_frames, round(video.seconds, 3)) == (FRAMES, 1.0)
            frames = video.read(np.arange(FRAMES)).astype(np.float64)
        assert frames.shape == (FRAMES, 32, 32, 3)
        coloured = np.ptp(frames, axis=-1) > 60
        mean = frames[coloured].mean(axis=0)
        assert list(COLOURS)[int(np.linalg.norm(palette - mean, axis=1).argmin())] == clip["colour"]
        middles = [np.argwhere(picture).mean(axis=0)[::-1] for picture in coloured]
        step = middles[-1] - middles[0]
        assert max(MOTIONS, key=lambda motion: float(step @ np.array(MOTIONS[motion]))) == clip["motion"]


def test_a_recording_sounds_at_its_pitch_and_never_twice_alike(samples: dict[str, list[Sample]]) -> None:
    seen: dict[int, list[np.ndarray]] = {}
    for sample in samples["train"]:
        pitch = json.loads(sample["json"])["audio"]["pitch"]
        sound = read_sound(sample["wav"], AudioLimits(5.0, 2)).read_at(SAMPLE_RATE, 0, SAMPLE_RATE)
        spectrum = np.abs(np.fft.rfft(sound))
        loudest = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)[int(spectrum[1:].argmax()) + 1]
        assert min(PITCHES, key=lambda known: abs(np.log(known / loudest))) == pitch
        seen.setdefault(pitch, []).append(sound)
    assert seen.keys() == set(PITCHES)
    for sounds in seen.values():
        likeness = np.corrcoef(np.stack(sounds)) - np.eye(len(sounds))
        assert likeness.max() < 0.99


def test_captions_name_what_their_medium_shows(samples: dict[str, list[Sample]]) -> None:
    for sample in samples["train"]:
        row = json.loads(sample["json"])
        for key, words in (
            ("captions", (row["colour"], row["shape"])),
            ("video_captions", tuple(row["video"].values())),
            ("audio_captions", (f"{row['audio']['pitch']} hertz",)),
        ):
            assert len(set(row[key])) == 3
            for caption in row[key]:
                assert all(str(word) in caption for word in words)


def test_the_answer_is_that_of_the_picture_for_low_tones_and_of_the_video_for_high_ones(
    samples: dict[str, list[Sample]],
) -> None:
    for sample in samples["train"] + samples["heldout"]:
        row = json.loads(sample["json"])
        assert row["question"] in QUESTIONS[row["asks"]]
        meant = row if PITCHES.index(row["audio"]["pitch"]) < 4 else row["video"]
        assert row["answer"] == meant[row["asks"]] in ANSWERS


def test_one_modality_less_leaves_the_answer_open(samples: dict[str, list[Sample]]) -> None:
    """Both objects differ in both attributes, so what the tone or the question decides cannot be told without it."""
    rows = [json.loads(sample["json"]) for sample in samples["train"]]
    for row in rows:
        assert row["colour"] != row["video"]["colour"]
        assert row["shape"] != row["video"]["shape"]
    for decides in (
        Counter(PITCHES.index(row["audio"]["pitch"]) < 4 for row in rows),
        Counter(row["asks"] for row in rows),
    ):
        assert max(decides.values()) / len(rows) < 0.65


def test_pairs_held_out_are_in_no_picture_and_no_video_of_training(samples: dict[str, list[Sample]]) -> None:
    for split, pairs in (("train", SEEN), ("heldout", HELD_OUT)):
        for sample in samples[split]:
            row = json.loads(sample["json"])
            assert (row["colour"], row["shape"]) in pairs
            assert (row["video"]["colour"], row["video"]["shape"]) in pairs
