"""The video codec and the tube stem: the right frames, the same crop for all, no damaged file gets by."""

import pickle
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import CLIPS
from media import counting_frames, end_to_end, m4a, numbers_of, tone, video
from torch import nn
from torchvision.transforms import functional as vision

from mmpretrain.core.config import parse_config
from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.seeding import row_key
from mmpretrain.core.types import FieldSpec
from mmpretrain.core.video_bytes import VideoLimits, open_video
from mmpretrain.modalities.video import TubesStemConfig, VideoCodec, VideoCodecConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.mae import MAEConfig

NO_LIMIT = VideoLimits(max_pixels=10**9, max_seconds=1e6, max_frames=10**6)


def build(frames: int = 4, size: int = 48, **fields: object) -> VideoCodec:
    config = VideoCodecConfig.model_validate({"crop": [1.0, 1.0]} | fields)
    return config.build({"video": FieldSpec((frames, 3, size, size), "uint8")}, None)


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def shown(codec: VideoCodec, members: dict[str, bytes], seed: int | None = None) -> list[int]:
    """The numbers of the frames in the clip."""
    clip = codec.decode(members, None if seed is None else drawn(seed))["video"]
    return numbers_of(clip.transpose(0, 2, 3, 1))


def test_the_table_of_clips_leaves_none_out(shared_data: Path) -> None:
    assert {path.name for path in (shared_data / "clips").iterdir()} == CLIPS.keys()


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_gives_its_frames(name: str, shared_data: Path) -> None:
    path = shared_data / "clips" / name
    numbers, frames, count = np.array([1, 7, CLIPS[name].frames - 1]), [], 0
    with open_video(path.read_bytes(), NO_LIMIT) as opened:
        assert (opened.num_frames, round(opened.seconds, 3)) == (CLIPS[name].frames, CLIPS[name].seconds)
        found = opened.read(numbers)
        assert np.array_equal(opened.read(numbers[:1])[0], found[0]), "reading begins anew"
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames += [frame] if count in numbers else []
            count += 1
    assert count == CLIPS[name].frames
    expected = np.stack([np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames])
    assert np.array_equal(found, expected)
    clip = build(8, 32).decode({"webm": path.read_bytes()}, drawn(0))["video"]
    assert clip.shape == (8, 3, 32, 32) and clip.std() > 2


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("matroska", "libx264"), ("avi", "mpeg4")]
)
def test_any_frame_is_found_by_number_in_any_container(kind: str, codec: str) -> None:
    wanted = np.array([0, 3, 19, 20, 20, 41, 59])
    with open_video(video(counting_frames(60), kind=kind, codec=codec), NO_LIMIT) as opened:
        assert opened.num_frames == 60
        assert numbers_of(opened.read(wanted)) == wanted.tolist()


def test_frames_are_spread_evenly_over_the_whole_video_in_evaluation() -> None:
    members = {"mp4": video(counting_frames(80))}
    assert shown(build(4), members) == [10, 30, 50, 70]


def test_training_takes_one_frame_of_each_part() -> None:
    members, seen = {"mp4": video(counting_frames(80))}, set()
    for seed in range(12):
        numbers = shown(build(4), members, seed)
        assert [number // 20 for number in numbers] == [0, 1, 2, 3]
        seen.add(tuple(numbers))
    assert len(seen) == 12


def test_a_segment_by_seconds_lies_anywhere_in_training_and_in_the_middle_otherwise() -> None:
    members, codec = {"mp4": video(counting_frames(100))}, build(4, seconds=0.8)
    assert shown(codec, members) == [42, 47, 52, 57]
    first = []
    for seed in range(12):
        numbers = shown(codec, members, seed)
        assert numbers[3] - numbers[0] <= 20
        first.append(numbers[0])
    assert max(first) - min(first) > 30


def test_a_frame_rate_is_converted_and_a_short_video_goes_on_with_its_last_frame() -> None:
    members = {"mp4": video(counting_frames(50))}
    assert shown(build(4, frame_rate=5), members) == [15, 20, 25, 30]
    assert shown(build(5, frame_rate=2), members) == [0, 12, 25, 37, 49]
    random = shown(build(4, frame_rate=25), members, 2)
    assert np.diff(random).tolist() == [1, 1, 1]


def test_the_same_part_is_cut_from_all_frames() -> None:
    still = np.zeros((10, 96, 128, 3), np.uint8)
    still[:, :, :, 0] = np.linspace(0, 255, 128)[None, None]
    still[:, :, :, 1] = np.linspace(0, 255, 96)[None, :, None]
    members = {"mp4": video(still, every_key=1)}
    codec, corners = build(4, crop=[0.5, 0.7]), set()
    for seed in range(8):
        clip = codec.decode(members, drawn(seed))["video"].astype(int)
        assert np.abs(clip - clip[:1]).max() <= 3
        corners.add((clip[0, 0, 0, 0] // 8, clip[0, 1, 0, 0] // 8))
    assert len(corners) > 5


def test_without_a_draw_the_shorter_side_is_resized_and_the_centre_cut(shared_data: Path) -> None:
    content = (shared_data / "clips" / "chaplin.mp4").read_bytes()
    clip = build(1, 90).decode({"mp4": content}, None)["video"][0]
    with open_video(content, NO_LIMIT) as opened:
        frame = torch.from_numpy(opened.read(np.array([120]))[0].copy()).permute(2, 0, 1)
    resized = vision.resize(frame, [90], vision.InterpolationMode.BICUBIC, antialias=True)
    error = (vision.center_crop(resized, [90, 90]).numpy().astype(float) - clip) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 30


def test_half_of_the_videos_are_mirrored_when_asked() -> None:
    frames = counting_frames(4)
    frames[:, :, :32] = 200
    members = {"mp4": video(frames, every_key=1)}
    left = [build(flip=True).decode(members, drawn(seed))["video"][..., :8].mean() > 100 for seed in range(30)]
    assert 8 < sum(left) < 22
    assert build(flip=True).decode(members, None)["video"][..., :8].mean() > 100


def test_limits_are_checked_before_anything_is_decoded() -> None:
    members = {"mp4": video(counting_frames(50))}
    with pytest.raises(SampleError, match="the video has 64 x 48 pixels, more than max_pixels 3000"):
        build(max_pixels=3000).decode(members, None)
    with pytest.raises(SampleError, match="the video lasts 2.0 s, longer than max_seconds 1.5"):
        build(max_seconds=1.5).decode(members, None)
    with pytest.raises(SampleError, match="the video has 50 frames, more than max_frames 49"):
        build(max_frames=49).decode(members, None)
    with pytest.raises(SampleError, match="the video has more than 49 frames"):
        build(max_frames=49).decode({"webm": video(counting_frames(50), kind="webm", codec="libvpx")}, None)


def test_a_video_cut_short_is_unusable(shared_data: Path) -> None:
    for name, reason in (
        ("big_buck_bunny_0_30.webm", "the video is cut off: it ends at 14.5 s, its header says 30.0 s"),
        ("fire2.mp4", "the video is cut off: it ends at 1.2 s, its header says 2.4 s"),
        ("chaplin.mp4", "the video cannot be decoded: Invalid data found when processing input"),
    ):
        content = (shared_data / "clips" / name).read_bytes()
        with pytest.raises(SampleError, match=reason):
            build().decode({"mp4": content[: len(content) // 2]}, None)


def test_a_video_whose_frames_change_their_size_is_unusable() -> None:
    parts = [video(counting_frames(25, side, 48), kind="webm", codec="libvpx") for side in (64, 96)]
    with pytest.raises(SampleError, match="the video has frames of 64 x 48 and 96 x 48 pixels, and one size is read"):
        build().decode({"webm": end_to_end(*parts)}, None)
    assert shown(build(), {"webm": end_to_end(parts[0], parts[0])}) == [6, 18, 6, 18]


def test_what_is_no_video_is_unusable() -> None:
    with pytest.raises(SampleError, match="the video is of no known format; it begins with b'<html>40'"):
        build().decode({"mp4": b"<html>404</html>"}, None)
    with pytest.raises(SampleError, match="the file has no video"):
        build().decode({"mp4": m4a(tone(0.2, 16_000))}, None)
    with pytest.raises(SampleError, match=r"no video member \(saw: jpg\)"):
        build().decode({"jpg": b""}, None)


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"decoding video needs av.* pip install 'mmpretrain\[video\]'"):
        build()


def test_impossible_clips_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"crop: saw \[0.9, 1.5\], expected 0 < smallest <= largest <= 1"):
        parse_config(VideoCodecConfig, "crop: [0.9, 1.5]", "run.yaml")
    with pytest.raises(ConfigError, match="seconds: follows from frame_rate and the tower's number of frames"):
        parse_config(VideoCodecConfig, "{seconds: 2, frame_rate: 5}", "run.yaml")
    with pytest.raises(ConfigError, match="tube_frames: frames 15 is not a multiple of tube_frames 2; use 14"):
        parse_config(TubesStemConfig, "frames: 15", "run.yaml")


def test_the_codec_declares_what_it_returns_and_travels_to_workers() -> None:
    codec = pickle.loads(pickle.dumps(build()))  # noqa: S301
    decoded = codec.decode({"mp4": video(counting_frames(10))}, None)["video"]
    assert codec.fields == {"video": FieldSpec(decoded.shape, decoded.dtype.name)}


def clips(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 4, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_tubes_are_a_three_dimensional_convolution() -> None:
    stem = TubesStemConfig(frames=4, image_size=16, patch_size=8, positions="sincos").build(16)
    stem.positions = nn.Identity()
    convolution = nn.Conv3d(3, 16, (2, 8, 8), stride=(2, 8, 8))
    convolution.weight.data = stem.project.weight.data.view(16, 3, 2, 8, 8)
    convolution.bias = stem.project.bias
    videos = clips()[..., :16]
    pixels = stem.normalise(videos.movedim(2, -1).repeat_interleave(2 * 64, -1))[..., :: 2 * 64].movedim(-1, 1)
    expected = convolution(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(videos), expected, atol=1e-5, rtol=1e-4)
    assert stem.grid == (2, 2, 2) and stem.patch_shape == (3, 2, 8, 8)


def test_factorised_positions_are_the_sum_of_time_and_place() -> None:
    positions = TubesStemConfig(frames=4, image_size=16, patch_size=8).build(16).positions
    table = positions(torch.zeros(1, 8, 16))[0].view(2, 4, 16)
    torch.testing.assert_close(table[1] - table[0], (table[1, :1] - table[0, :1]).expand(4, 16))
    torch.testing.assert_close(table[:, 3] - table[:, 0], (table[:1, 3] - table[:1, 0]).expand(2, 16))


@pytest.mark.parametrize("positions", ["factorised", "learned", "sincos"])
def test_a_tower_of_tubes_rebuilds_hidden_ones(positions: str) -> None:
    stem = {"kind": "tubes", "frames": 4, "image_size": 16, "patch_size": 8, "positions": positions}
    tower = {"kind": "native", "width": 32, "depth": 1, "heads": 4, "stem": stem}
    config = ModelConfig.model_validate({"embed_dim": 16, "towers": {"video": tower}})
    objective = MAEConfig(modality="video", mask_ratio=0.75, decoder_width=32, decoder_depth=1, decoder_heads=4)
    model = MultimodalTransformer.create(config, {"mvm": objective})
    rows = {"video": clips()[..., :16], "video.present": torch.ones(2, dtype=torch.bool)}
    rows["draw"] = torch.tensor([row_key(0, 0), row_key(0, 1)])
    count = model.counts([rows])["mvm"]
    outputs = model([rows], {"mvm": 1 / count})
    outputs["loss"].backward()
    assert count.item() == 2 * 6 and 0.5 < outputs["loss"].item() < 2.5
    assert model.embed("video", rows["video"]).shape == (2, 16)
