"""Samples that lack a modality, and modality dropout: the same for every codec, and never mistaken for broken ones."""

import json
from collections.abc import Mapping
from io import BytesIO

import numpy as np
import pytest
from media import counting_frames, m4a, recording, tone, video
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from mmpretrain.core.errors import SampleError
from mmpretrain.core.registry import discover
from mmpretrain.core.seeding import generator
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.base import CodecConfig, PresenceCodec

SPECS = {
    "image": FieldSpec((3, 8, 8), "uint8"),
    "text": FieldSpec((4,), "int64"),
    "audio": FieldSpec((1600,), "int16", 16_000),
    "video": FieldSpec((2, 3, 8, 8), "uint8"),
    "label": FieldSpec((), "int64", below=3),
}
CODECS = discover("mmpretrain.modalities", CodecConfig)


def jpeg(shade: int = 0) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.arange(3 * 20 * 20, dtype=np.uint8).reshape(20, 20, 3) // 2 + np.uint8(shade)).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """A sample with everything."""
    return {
        "jpg": jpeg(),
        "json": json.dumps({"captions": ["a b", "b a"], "label": 2}).encode(),
        "wav": recording(tone(0.2, 16_000), 16_000),
        "mp4": video(counting_frames(12)),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def codec_of(modality: str, tokenizer: str, **settings: object) -> PresenceCodec:
    return CODECS[modality].model_validate(settings).codec(SPECS, tokenizer)


BROKEN: dict[str, Mapping[str, bytes]] = {
    "image": {"jpg": b"no picture"},
    "text": {"json": b"{"},
    "audio": {"wav": b"no sound"},
    "video": {"mp4": b"no film"},
    "label": {"json": b'{"label": 7}'},
}


def test_the_cases_cover_every_codec() -> None:
    assert CODECS.keys() == SPECS.keys() == BROKEN.keys()


@pytest.mark.parametrize("modality", CODECS)
def test_a_sample_without_the_modality_is_a_row_of_zeros_that_says_so(
    modality: str, tokenizer: str, whole: dict[str, bytes]
) -> None:
    codec = codec_of(modality, tokenizer, missing="weightless")
    absent, present = codec.decode({"xyz": b"of no modality"}, None), codec.decode(whole, None)
    for found, is_present in ((absent, False), (present, True)):
        assert {n: (a.shape, a.dtype.name) for n, a in found.items()} == {
            n: (spec.shape, spec.dtype) for n, spec in codec.fields.items()
        }
        assert found[f"{modality}.present"] == is_present
    assert not any(array.any() for array in absent.values())
    assert present[modality].any() and not codec.required


@pytest.mark.parametrize("modality", CODECS)
def test_a_sample_without_a_required_modality_is_unusable(modality: str, tokenizer: str) -> None:
    codec = codec_of(modality, tokenizer)
    assert codec.required
    with pytest.raises(SampleError, match=r"no .*\(saw: xyz\)"):
        codec.decode({"xyz": b"of no modality"}, None)


@pytest.mark.parametrize("missing", ["refuse", "weightless"])
@pytest.mark.parametrize("modality", CODECS)
def test_a_broken_member_is_not_a_missing_one(modality: str, missing: str, tokenizer: str) -> None:
    with pytest.raises(SampleError, match=r"cannot be|no known format|is not JSON|is none of the 3 classes"):
        codec_of(modality, tokenizer, missing=missing).decode(BROKEN[modality], None)


def test_a_video_without_a_sound_track_lacks_audio_and_a_damaged_one_is_broken(tokenizer: str) -> None:
    codec = codec_of("audio", tokenizer, source="video", missing="weightless")
    silent, sounding = video(counting_frames(12)), video(counting_frames(12), sound=tone(0.4, 16_000))
    assert codec.decode({"mp4": sounding}, None)["audio.present"]
    assert not codec.decode({"mp4": silent}, None)["audio.present"]
    with pytest.raises(SampleError, match="the audio cannot be decoded"):
        codec.decode({"mp4": sounding[: len(sounding) // 2]}, None)
    with pytest.raises(SampleError, match="the file has no audio"):
        codec_of("audio", tokenizer, source="video").decode({"mp4": silent}, None)


def test_an_audio_file_without_sound_is_broken(tokenizer: str) -> None:
    codec = codec_of("audio", tokenizer, missing="weightless")
    assert codec.decode({"m4a": m4a(tone(0.3, 16_000))}, None)["audio.present"]
    with pytest.raises(SampleError, match="the file has no audio"):
        codec.decode({"m4a": video(counting_frames(12))}, None)


def test_a_caption_of_blanks_is_no_caption(tokenizer: str) -> None:
    assert not codec_of("text", tokenizer, missing="weightless").decode({"txt": b" \n"}, None)["text.present"]


@pytest.mark.parametrize("modality", CODECS)
def test_dropout_leaves_out_the_asked_share_in_training_and_nothing_in_evaluation(
    modality: str, tokenizer: str, whole: dict[str, bytes]
) -> None:
    never, sometimes = codec_of(modality, tokenizer), codec_of(modality, tokenizer, drop=0.25)
    rows = 200 if modality in ("text", "label") else 40
    kept = 0
    for position in range(rows):
        with_all, found = (codec.decode(whole, generator(position)) for codec in (never, sometimes))
        again = sometimes.decode(whole, generator(position))
        kept += int(found[f"{modality}.present"])
        for name, array in found.items():
            np.testing.assert_array_equal(again[name], array)
            wanted = with_all[name] if found[f"{modality}.present"] else np.zeros_like(array)
            np.testing.assert_array_equal(array, wanted)
    assert abs(kept / rows - 0.75) < 3 * (0.25 * 0.75 / rows) ** 0.5
    assert sometimes.decode(whole, None)[f"{modality}.present"]


def test_dropout_spares_no_sample_that_is_unusable(tokenizer: str) -> None:
    codec = codec_of("text", tokenizer, drop=0.9)
    for position in range(20):
        with pytest.raises(SampleError, match="no caption"):
            codec.decode({}, generator(position))


def test_what_is_kept_is_decoded_once_without_augmentation_and_dropped_anew(
    tokenizer: str, whole: dict[str, bytes]
) -> None:
    kept = codec_of("image", tokenizer, keep=True, drop=0.25, crop_scale=[0.2, 0.5])
    plain = codec_of("image", tokenizer).decode(whole, None)["image"]
    found = [kept.decode(whole, generator(position)) for position in range(60)]
    present = [row["image.present"] for row in found]
    assert 0 < sum(present) < 60
    for row in found:
        np.testing.assert_array_equal(row["image"], plain if row["image.present"] else np.zeros_like(plain))
    assert len(kept.kept or ()) == 1
    other = {**whole, "jpg": jpeg(shade=9)}
    assert not np.array_equal(kept.decode(other, None)["image"], plain)
    assert len(kept.kept or ()) == 2
    with pytest.raises(SampleError, match="cannot be"):
        kept.decode({"jpg": b"no picture"}, None)
