"""Pictures, sounds, videos and texts of a stranger: each is one counted skip with its reason, or decodes in bounds."""

import io
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from guard import only_within
from hostile import DEEP, HALF_CHARACTER, HUGE_NUMBER, PICTURE, exit_code, flac, png, wav, write_tar
from media import m4a, video
from PIL import Image
from published_model import write_tokenizer

from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig
from data_pipeline.loader import build_loader
from mmpretrain.core.errors import SampleError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.audio import AudioCodecConfig
from mmpretrain.modalities.base import CodecConfig, PresenceCodec
from mmpretrain.modalities.image import ImageCodecConfig
from mmpretrain.modalities.label import LabelCodecConfig
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.modalities.video import VideoCodecConfig

INPUTS = {
    "image": FieldSpec((3, 16, 16), "uint8"),
    "audio": FieldSpec((16_000,), "int16", 16_000),
    "video": FieldSpec((4, 3, 16, 16), "uint8"),
    "text": FieldSpec((12,), "int64"),
    "label": FieldSpec((), "int64", below=10),
    "value": FieldSpec((1,), "float32"),
}
CONFIGS: Mapping[str, CodecConfig] = {
    "image": ImageCodecConfig(),
    "audio": AudioCodecConfig(source="file"),
    "video": VideoCodecConfig(),
    "text": TextCodecConfig(),
    "label": LabelCodecConfig(),
    "value": LabelCodecConfig(field="value", key="value"),
}


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, PresenceCodec]:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "words")
    return MappingProxyType({name: config.codec(INPUTS, str(tokenizer)) for name, config in CONFIGS.items()})


def postscript() -> bytes:
    """Pillow hands such a picture to Ghostscript, a whole programming language."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/owned) (w) file closefile\n%%EOF\n"


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each goes over all pixels again."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def endless_tiff() -> bytes:
    """A directory of one picture of 4 billion pixels that is followed by itself."""
    entries = [(256, 4, 1, 0xFFFF), (257, 4, 1, 0xFFFF), (258, 3, 1, 8), (259, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 8)


def tall_bitmap() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 2_000_000_000, -2_000_000_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(head), 0, 0, 14 + len(head)) + head


def long_film() -> bytes:
    """A clip whose header promises a million seconds."""
    content = video(np.zeros((5, 32, 32, 3), np.uint8), kind="matroska")
    duration = content.index(b"\x44\x89\x88") + 3
    return content[:duration] + struct.pack(">d", 1e9) + content[duration + 8 :]


ZEROS = zlib.compress(bytes(1 << 26))
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
DASH = (
    b'<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>http://127.0.0.1:9/</BaseURL></AdaptationSet></Period>'
)
JSON_OF_LABEL = '{{"label": {0}, "value": {0}}}'

UNUSABLE: Mapping[str, tuple[str, str, bytes, str]] = {
    # name: codec, extension, content, reason
    "3.6 billion pixels in 80 bytes": ("image", "png", png(60_000, 60_000), "exceeds limit of"),
    "a hundred million pixels in 80 bytes": ("image", "png", png(10_000, 10_000), "more than max_pixels"),
    "64 megabytes of text in a picture": (
        "image",
        "png",
        png(1, 1, (b"zTXt", b"a\0\0" + ZEROS)),
        "cannot be opened",
    ),
    "postscript that calls itself a jpg": ("image", "jpg", postscript(), "of no known format"),
    "ten thousand scans": ("image", "jpg", many_scans(10_000), "a JPEG of 1000. scans, more than 100"),
    "a picture of no size": ("image", "png", png(0, 0), "of no known format"),
    "a directory that follows itself": ("image", "tiff", endless_tiff(), "cannot be opened|more than max_pixels"),
    "a bitmap of two billion rows": ("image", "bmp", tall_bitmap(), "cannot be opened|exceeds limit"),
    "vector graphics": (
        "image",
        "png",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "of no",
    ),
    "a sound of two billion samples a second": ("audio", "wav", wav(2_147_483_647), "more than 768000"),
    "a rate that no filter reaches": ("audio", "wav", wav(384_001), "do not become 16000"),
    "a thousand channels": ("audio", "wav", wav(channels=1000), "more than max_channels 8"),
    "samples of no bits": ("audio", "wav", wav(bits=0), "its codec is not known here"),
    "samples of 64 bits": ("audio", "wav", wav(bits=64), "'s64' format .* is not supported"),
    "no channels": ("audio", "wav", wav(channels=0), "no sample rate or no channels"),
    "no samples a second": ("audio", "wav", wav(0), "cannot be decoded"),
    "a sound that promises 29 hours": ("audio", "flac", flac(655_350, (1 << 36) - 1), "longer than max_seconds 3600"),
    "a sound that is not there": ("audio", "flac", flac(48_000, 48_000 * 60), "cannot be decoded"),
    "a playlist as a sound": ("audio", "mp3", b"ID3" + PLAYLIST, "cannot be decoded"),
    "a playlist as a video": ("video", "mp4", PLAYLIST, "of no known format"),
    "a list of files to join": ("video", "mp4", b"ffconcat version 1.0\nfile '/etc/passwd'\n", "of no known format"),
    "a list of addresses": ("video", "webm", DASH, "of no known format"),
    "a video that promises hours": ("video", "mkv", long_film(), "lasts 1000000.0 s, longer than max_seconds"),
    "a sound called a video": ("video", "mp4", m4a(np.zeros(16_000, np.float32)), "has no video"),
    "a caption of two million letters": (
        "text",
        "json",
        b'{"caption": "%s"}' % (b"a" * 2_000_000),
        "more than 1000000",
    ),
    "17 megabytes of text": ("text", "txt", b"a " * (9 << 20), "bytes of text, more than"),
    "JSON nested too deep": ("text", "json", DEEP.encode(), "nested too deep"),
    "a number of thousands of digits": ("text", "json", HUGE_NUMBER.encode(), "is not JSON: Exceeds the limit"),
    "half a character": (
        "text",
        "json",
        f'{{"captions": [{HALF_CHARACTER}]}}'.encode(),
        "it holds half of a character",
    ),
    "a class of thousands of digits": ("label", "cls", HUGE_NUMBER.encode(), "the label cannot be read"),
    "a label nested too deep": ("label", "json", DEEP.encode(), "nested too deep"),
    "a label beyond all classes": (
        "label",
        "json",
        JSON_OF_LABEL.format(10**300).encode(),
        "is none of the 10 classes",
    ),
    "a label that is not finite": ("value", "json", JSON_OF_LABEL.format("1e999").encode(), "is not finite"),
    "a label that is no number at all": ("value", "json", JSON_OF_LABEL.format("NaN").encode(), "is not finite"),
    "a label beyond any float": ("value", "json", JSON_OF_LABEL.format("1" * 400).encode(), "too large"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_hostile_member_is_unusable_for_a_reason(
    name: str, tmp_path: Path, codecs: Mapping[str, PresenceCodec]
) -> None:
    codec, extension, content, reason = UNUSABLE[name]
    begin = time.process_time()
    with only_within(tmp_path), pytest.raises(SampleError, match=reason):
        codecs[codec].decode({extension: content}, None)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("codec", "extension", "content"),
    [
        pytest.param("image", "png", png(1, 1, data=bytes(1 << 26)), id="pixels of 64 megabytes for one"),
        pytest.param("image", "png", png(1, 1, (b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(99))), id="endless EXIF"),
        pytest.param("audio", "wav", wav(size=0xFFFFFFFF), id="a size of four gigabytes"),
        pytest.param("audio", "wav", wav(384_000, data=bytes(800_000)), id="a rate of the highest fidelity"),
    ],
)
def test_what_is_odd_and_harmless_decodes_in_bounds(
    codec: str, extension: str, content: bytes, codecs: Mapping[str, PresenceCodec], tmp_path: Path
) -> None:
    begin = time.process_time()
    with only_within(tmp_path):
        fields = codecs[codec].decode({extension: content}, None)
    assert fields[codec].shape == INPUTS[codec].shape and time.process_time() - begin < 5


def test_of_thousands_of_frames_one_is_decoded(codecs: Mapping[str, PresenceCodec]) -> None:
    frames = [Image.new("P", (64, 64), number % 250) for number in range(3000)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    begin = time.process_time()
    assert codecs["image"].decode({"gif": buffer.getvalue()}, None)["image"].shape == (3, 16, 16)
    assert time.process_time() - begin < 1


def test_a_run_counts_each_of_them_and_goes_on(tmp_path: Path, codecs: Mapping[str, PresenceCodec]) -> None:
    hostile = {name: row for name, row in UNUSABLE.items() if row[0] == "image"}
    members = {f"good{number}.png": PICTURE for number in range(40)}
    members |= {f"{name.replace(' ', '_').replace('.', '_')}.{row[1]}": row[2] for name, row in hostile.items()}
    write_tar(tmp_path / "s.tar", members)
    config = DataConfig(train=MixtureConfig(sources={"main": SourceConfig(shards=(str(tmp_path),))}), workers=0)
    with only_within(tmp_path):
        loader = build_loader(config, {"image": codecs["image"]}, BatchPlan(7, 7, World()), 0, 0, len(members) // 7 + 1)
        batches = [batch for step in loader for batch in step]
    skipped = {skip.key: skip.reason for batch in batches for skip in batch.skips}
    assert skipped.keys() == {key.rpartition(".")[0] for key in members if not key.startswith("good")}
    assert all(batch.tensors["image.present"].all() for batch in batches)


def test_checking_them_names_each_and_starts_no_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = [row for row in UNUSABLE.values() if row[0] == "image" and "max_pixels" not in row[3]]
    write_tar(tmp_path / "s.tar", {f"{number}.{row[1]}": row[2] for number, row in enumerate(hostile)})
    with only_within(tmp_path):
        assert exit_code("data", "check", tmp_path, "--workers", 1) == 3
        assert exit_code("data", "preview", tmp_path, "--out", tmp_path / "sheet.png") == 0
    assert f"{len(hostile)} faults in 1 of 1 shards" in capsys.readouterr().err
