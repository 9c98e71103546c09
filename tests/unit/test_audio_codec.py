"""The audio codec against soundfile, SciPy and sines: the same samples, the right rate, no damaged file gets by."""

import pickle
import sys
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from clips import CLIPS
from media import counting_frames, m4a, recording, tone, video

from mmpretrain.core.audio_bytes import AudioLimits, EncodedAudio, read_header
from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.audio import AudioCodec, AudioCodecConfig

NO_LIMIT = AudioLimits(max_seconds=1e6, max_channels=64)


def build(length: int = 1600, rate: int | None = 16_000, **fields: object) -> AudioCodec:
    config = AudioCodecConfig.model_validate(fields)
    return config.build({"audio": FieldSpec((length,), "int16", rate)}, None)


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def header(content: bytes) -> EncodedAudio:
    return read_header(content, NO_LIMIT)


def loudness(signal: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(signal.astype(np.float64) ** 2) + 1e-30))


def test_a_wav_of_the_right_rate_comes_out_bit_for_bit() -> None:
    samples = drawn(0).integers(-32768, 32768, 1600).astype(np.int16)
    decoded = build().decode({"wav": recording(samples, 16_000)}, None)
    assert np.array_equal(decoded["audio"], samples)
    assert decoded["audio.mask"].tolist() == [True] * 10


def test_channels_are_averaged() -> None:
    left, right = np.full(1600, 1000, np.int16), np.full(1600, -500, np.int16)
    decoded = build().decode({"wav": recording(np.stack([left, right], axis=1), 16_000)}, None)
    assert np.array_equal(decoded["audio"], np.full(1600, 250))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_is_converted_without_delay_loss_or_aliases(rate: int) -> None:
    resampled = header(recording(tone(1.0, rate, 1000.0), rate, subtype="FLOAT")).read_at(16_000, 0, 10**6)
    assert len(resampled) == 16_000
    assert loudness((resampled - tone(1.0, 16_000, 1000.0))[200:-200]) < -75
    if rate > 16_000:
        alias = header(recording(tone(1.0, rate, 9000.0), rate, subtype="FLOAT")).read_at(16_000, 0, 10**6)
        assert loudness(alias[200:-200]) < -75


@pytest.mark.parametrize("rate", [11_127, 22_050, 44_100])
def test_a_stretch_is_what_it_is_of_the_whole_recording(rate: int) -> None:
    encoded = header(recording(drawn(1).normal(0, 0.1, 3 * rate).astype(np.float32), rate, subtype="FLOAT"))
    whole = encoded.read_at(16_000, 0, 10**6)
    for begin, length in ((0, 500), (12_345, 4_000), (40_001, 10**6)):
        np.testing.assert_allclose(encoded.read_at(16_000, begin, length), whole[begin:][:length], atol=1e-6)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_the_content_tells_the_format_not_the_extension(kind: str) -> None:
    content = recording(tone(0.5, 16_000), 16_000, kind)
    decoded = build(8000).decode({"wav": content}, None)["audio"] / 32768
    assert loudness((decoded - tone(0.5, 16_000))[1600:-1600]) < -30


def test_a_longer_recording_is_cut_at_random_in_training_and_in_the_middle_otherwise() -> None:
    ramp = np.arange(4800, dtype=np.int16)
    members = {"wav": recording(ramp, 16_000)}
    begins = [int(build().decode(members, drawn(seed))["audio"][0]) for seed in range(50)]
    assert len(set(begins)) > 40 and min(begins) < 400 and 2800 < max(begins) <= 3200
    assert np.array_equal(build().decode(members, drawn(3))["audio"], ramp[begins[3] : begins[3] + 1600])
    assert build().decode(members, None)["audio"][0] == 1600
    assert build(segment="centre").decode(members, drawn(0))["audio"][0] == 1600
    assert build(segment="first").decode(members, drawn(0))["audio"][0] == 0


def test_a_shorter_recording_is_padded_and_the_mask_tells_or_repeated() -> None:
    members = {"wav": recording(np.full(500, 7, np.int16), 16_000)}
    padded = build().decode(members, None)
    assert padded["audio"].tolist() == [7] * 500 + [0] * 1100
    assert padded["audio.mask"].tolist() == [True] * 4 + [False] * 6
    repeated = build(short="repeat").decode(members, None)
    assert repeated["audio"].tolist() == [7] * 1600 and repeated["audio.mask"].all()
    whole = build(short="repeat_whole").decode(members, None)
    assert whole["audio"].tolist() == [7] * 1500 + [0] * 100
    assert whole["audio.mask"].tolist() == [True] * 10  # the last block holds 60 samples


def test_the_sound_of_a_video_is_a_recording_and_a_file_comes_before_it() -> None:
    clip = video(counting_frames(25), sound=tone(1.0, 16_000))
    decoded = build(16_000).decode({"mp4": clip}, None)["audio"] / 32768
    assert loudness((decoded - tone(1.0, 16_000))[3200:-3200]) < -40
    members = {"mp4": clip, "wav": recording(np.full(1600, 9, np.int16), 16_000)}
    assert build().decode(members, None)["audio"].tolist() == [9] * 1600
    assert build(source="video").decode(members, None)["audio"].max() > 1000
    with pytest.raises(SampleError, match=r"no audio member \(saw: mp4\)"):
        build(source="file").decode({"mp4": clip}, None)


def test_what_soundfile_does_not_read_pyav_does() -> None:
    content = m4a(tone(1.0, 16_000))
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(BytesIO(content))
    decoded = build(16_000).decode({"m4a": content}, None)["audio"] / 32768
    assert loudness((decoded - tone(1.0, 16_000))[3200:-3200]) < -40


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_gives_its_samples_or_its_reason(name: str, shared_data: Path) -> None:
    path, expected = shared_data / "clips" / name, CLIPS[name].sound
    content = path.read_bytes()
    if isinstance(expected, str):
        with pytest.raises(SampleError, match=expected):
            header(content)
        return
    encoded = header(content)
    assert (encoded.sample_rate, encoded.channels, encoded.num_samples) == (
        expected.rate,
        expected.channels,
        expected.samples,
    )
    with av.open(str(path)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == expected.decoded
    whole = encoded.read(0, 10**9)
    assert len(whole) == encoded.num_samples and np.abs(whole).max() <= 1.5
    middle = encoded.num_samples // 2
    jumped = encoded.read(middle, middle + 4000)
    shifts = [np.abs(whole[middle + shift :][:4000] - jumped).max() for shift in range(-50, 50)]
    assert len(jumped) == 4000 and min(shifts) < 1e-4  # the clock of a WebM file is rounded to milliseconds


def test_spoken_captions_named_wav_hold_mp3_and_decode(shared_data: Path) -> None:
    for path in sorted((shared_data / "flickr1k" / "speech").iterdir())[:20]:
        decoded = build(16_000 * 12).decode({"wav": path.read_bytes()}, None)
        whole, rate = soundfile.read(path)
        assert abs(decoded["audio.mask"].sum() / 100 - len(whole) / rate) < 0.02
        assert np.abs(decoded["audio"]).max() > 3000


def test_limits_are_checked_before_anything_is_decoded() -> None:
    content = recording(np.zeros((16_000, 2), np.int16), 16_000)
    with pytest.raises(SampleError, match="the audio has 2 channels, more than max_channels 1"):
        build(max_channels=1).decode({"wav": content}, None)
    with pytest.raises(SampleError, match="the audio lasts 1.0 s, longer than max_seconds 0.5"):
        build(max_seconds=0.5).decode({"wav": content}, None)
    clip = video(counting_frames(25), sound=tone(1.0, 16_000))
    with pytest.raises(SampleError, match=r"the audio lasts 1.\d s, longer than max_seconds 0.5"):
        build(max_seconds=0.5).decode({"mp4": clip}, None)


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_a_cut_recording_is_unusable(kind: str) -> None:
    content = recording(drawn(0).normal(0, 0.1, 32_000), 16_000, kind)
    with pytest.raises(SampleError, match="the audio (cannot be decoded|is cut off|holds no samples)"):
        build(32_000).decode({"flac": content[: len(content) // 2]}, None)


def test_what_is_no_recording_is_unusable() -> None:
    with pytest.raises(SampleError, match="the audio is of no known format; it begins with b'<html>40'"):
        build().decode({"mp3": b"<html>404</html>"}, None)
    with pytest.raises(SampleError, match="the audio holds no samples"):
        build().decode({"wav": recording(np.zeros(0, np.int16), 16_000)}, None)
    with pytest.raises(SampleError, match="the audio cannot be decoded: "):
        build().decode({"mp4": video(counting_frames(3))[:300]}, None)
    with pytest.raises(SampleError, match=r"no audio member \(saw: txt\)"):
        build().decode({"txt": b""}, None)


def test_a_playlist_never_makes_the_decoder_open_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(recording(tone(1, 16_000), 16_000))
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(SampleError, match="of no known format"):
        build().decode({"mp4": playlist}, None)


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"decoding audio needs soundfile.* pip install 'mmpretrain\[audio\]'"):
        build()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"needs av, which is not installed; run pip install 'mmpretrain\[video\]'"):
        header(b"\0\0\0\x20ftypisom")


def test_a_tower_of_an_odd_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="wants 11025 samples per second; the codec makes multiples of 100"):
        build(rate=11_025)


def test_the_codec_declares_what_it_returns_and_travels_to_workers() -> None:
    codec = pickle.loads(pickle.dumps(build(1650)))  # noqa: S301
    decoded = codec.decode({"wav": recording(tone(1, 16_000), 16_000)}, None)
    assert {name: (spec.shape, spec.dtype) for name, spec in codec.fields.items()} == {
        name: (array.shape, array.dtype.name) for name, array in decoded.items()
    }
