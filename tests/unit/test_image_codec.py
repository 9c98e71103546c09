"""The image codec against Pillow and torchvision: the same pixels, the same geometry, no damaged file gets by."""

import pickle
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import functional as vision

from mmpretrain.core.config import parse_config
from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.image_bytes import read_header
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.image import ImageCodec, ImageCodecConfig

NO_LIMIT = 10**9


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((shared_data / "flickr1k" / "images").iterdir())[:100]]


def build(size: int = 224, **fields: object) -> ImageCodec:
    return ImageCodecConfig(**fields).build({"image": FieldSpec((3, size, size), "uint8")}, None)  # type: ignore[arg-type]


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def psnr(seen: np.ndarray, wanted: np.ndarray) -> float:
    error = np.mean((seen.astype(np.float64) - wanted.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def test_a_jpeg_decodes_bit_for_bit_as_in_pillow(photos: list[bytes]) -> None:
    for photo in photos:
        header = read_header(photo, NO_LIMIT)
        wanted = np.asarray(Image.open(BytesIO(photo)).convert("RGB"))
        assert header.plain_jpeg
        assert (header.height, header.width) == wanted.shape[:2]
        assert np.array_equal(header.read(), wanted)


def test_a_resized_photo_is_within_50_db_of_pillow(photos: list[bytes]) -> None:
    """Evaluation: shorter side to 224 by Pillow's antialiased bicubic, centre cut by torchvision."""
    qualities = []
    for photo in photos[:40]:
        resized = vision.resize(Image.open(BytesIO(photo)).convert("RGB"), 224, vision.InterpolationMode.BICUBIC)
        wanted = np.asarray(vision.center_crop(resized, [224, 224])).transpose(2, 0, 1)
        qualities.append(psnr(build().decode({"jpg": photo}, None)["image"], wanted))
    assert np.median(qualities) >= 50 and min(qualities) >= 45


def test_a_photo_decoded_at_a_fraction_stays_close_to_the_full_decode(photos: list[bytes]) -> None:
    """A mosaic of 1600 x 1200, resized to 224: decoded at half size."""
    mosaic = Image.new("RGB", (1600, 1200))
    for number, photo in enumerate(photos[:16]):
        tile = Image.open(BytesIO(photo)).convert("RGB").resize((400, 300), Image.Resampling.BICUBIC)
        mosaic.paste(tile, (number % 4 * 400, number // 4 * 300))
    content = encode(mosaic, quality=90)
    assert read_header(content, NO_LIMIT).read(shrink=2).shape == (600, 800, 3)
    full = np.asarray(Image.open(BytesIO(content)).resize((298, 224), Image.Resampling.BICUBIC, box=(0, 0, 1600, 1200)))
    wanted = full.transpose(2, 0, 1)[:, :, 37:261]
    assert psnr(build().decode({"jpg": content}, None)["image"], wanted) > 45


def test_a_random_crop_shows_the_part_of_the_image_it_names() -> None:
    """On a gradient, the corners of the result tell the box that was cut."""
    for seed in range(20):
        draw, content = np.random.default_rng(seed), encode(gradient(640, 480), "PNG")
        pixels = build(64, crop_scale=[0.2, 0.6]).decode({"png": content}, draw)["image"].astype(float)
        left, right = pixels[0, 32, 0] / 255, pixels[0, 32, -1] / 255
        top, bottom = pixels[1, 0, 32] / 255, pixels[1, -1, 32] / 255
        assert 0.17 < (right - left) * (bottom - top) < 0.62
        assert 0.7 < (right - left) * 640 / ((bottom - top) * 480) < 1.4


def test_crops_follow_the_draw_alone() -> None:
    members = {"jpg": encode(gradient(300, 200))}
    codec = build(32, flip=True)

    def decode(seed: int) -> np.ndarray:
        return codec.decode(members, np.random.default_rng(seed))["image"]

    assert np.array_equal(decode(1), decode(1)) and not np.array_equal(decode(1), decode(2))


def test_a_flip_mirrors_half_of_the_images() -> None:
    members = {"png": encode(gradient(64, 64), "PNG")}
    plain, flipped = (
        build(64, crop_scale=[1, 1], crop_ratio=[1, 1]),
        build(64, crop_scale=[1, 1], crop_ratio=[1, 1], flip=True),
    )
    upright = plain.decode(members, np.random.default_rng(0))["image"]
    seen = [flipped.decode(members, np.random.default_rng(seed))["image"] for seed in range(40)]
    mirrored = sum(np.array_equal(pixels, upright[:, :, ::-1]) for pixels in seen)
    assert sum(np.array_equal(pixels, upright) for pixels in seen) == 40 - mirrored
    assert 10 < mirrored < 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(gradient(), kind, exif=exif)
    header = read_header(content, NO_LIMIT)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(content))))
    assert (header.height, header.width) == wanted.shape[:2]
    assert np.array_equal(header.read(), wanted)


def _palette() -> bytes:
    return encode(gradient().quantize(16), "PNG")


def _grey_16_bit() -> bytes:
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    return encode(Image.fromarray(values), "PNG")


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode(gradient(), "PNG"),
        lambda: encode(gradient().convert("RGBA"), "PNG"),
        lambda: encode(gradient(), "WEBP", lossless=True),
        lambda: encode(gradient(), "BMP"),
        lambda: encode(gradient(), "TIFF"),
        lambda: encode(gradient(), "PPM"),
        lambda: encode(gradient().convert("L")),
        lambda: encode(gradient().convert("CMYK")),
        lambda: encode(gradient(), progressive=True),
        _palette,
    ],
)
def test_other_kinds_of_images_decode_as_in_pillow_whatever_their_extension(make: Callable[[], bytes]) -> None:
    content = make()
    wanted = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    assert np.array_equal(read_header(content, NO_LIMIT).read(), wanted)
    assert build(32).decode({"txt": b"a", "jpg": content}, None)["image"].shape == (3, 32, 32)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    pixels = read_header(_grey_16_bit(), NO_LIMIT).read()
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[-1, -1].tolist() == [255, 255, 255]
    assert 120 < pixels[24].mean() < 136


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    content = encode(gradient())
    assert np.array_equal(read_header(content + b"trailer", NO_LIMIT).read(), read_header(content, NO_LIMIT).read())


@pytest.mark.parametrize("kept", [10, 400, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_unusable_wherever_it_was_cut(kind: str, kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = encode(noise, kind)
    cut = content[: int(kept * len(content)) if kept < 1 else int(kept)]
    with pytest.raises(SampleError, match="the image cannot be (opened|decoded): "):
        build(32).decode({"jpg": cut}, None)


def test_what_is_no_image_is_unusable() -> None:
    with pytest.raises(SampleError, match="the image cannot be opened: of no known format"):
        build().decode({"jpg": b"<html>404</html>"}, None)
    with pytest.raises(SampleError, match=r"no image member \(saw: txt, json\)"):
        build().decode({"txt": b"", "json": b""}, None)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    small = encode(gradient(), "PNG")
    header = b"IHDR" + struct.pack(">II", 12_000, 12_000) + small[24:29]
    content = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(SampleError, match="the image has 12000 x 12000 pixels, more than max_pixels 64000000"):
        build().decode({"png": content}, None)
    with pytest.raises(SampleError, match="the image has 64 x 48 pixels, more than max_pixels 3000"):
        build(max_pixels=3000).decode({"jpg": encode(gradient())}, None)


def test_the_codec_declares_what_it_returns_and_travels_to_workers() -> None:
    codec = pickle.loads(pickle.dumps(build(48)))  # noqa: S301
    decoded = codec.decode({"jpg": encode(gradient())}, None)["image"]
    assert codec.fields == {"image": FieldSpec(decoded.shape, decoded.dtype.name)}


def test_an_image_far_from_square_is_cut_in_the_middle() -> None:
    members = {"png": encode(gradient(1000, 10), "PNG")}
    for draw in (None, np.random.default_rng(0)):
        red = build(32).decode(members, draw)["image"][0].astype(int)
        assert abs(red.mean() - 127) < 8


def test_an_image_too_far_from_square_is_unusable_in_evaluation() -> None:
    members = {"png": encode(Image.new("RGB", (100_000, 1)), "PNG")}
    message = "the image has 100000 x 1 pixels, so .* to 22400000 x 224, more than 64000000 pixels"
    with pytest.raises(SampleError, match=message):
        build(224).decode(members, None)
    assert build(224).decode(members, np.random.default_rng(0))["image"].shape == (3, 224, 224)
    enlarged = build(48, max_pixels=100).decode({"png": encode(gradient(10, 10), "PNG")}, None)
    assert enlarged["image"].shape == (3, 48, 48)


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"crop_scale: saw \[0.9, 1.5\], expected 0 < smallest <= largest <= 1"):
        parse_config(ImageCodecConfig, "crop_scale: [0.9, 1.5]", "run.yaml")
    with pytest.raises(ConfigError, match=r"crop_ratio: saw \[2.0, 1.0\], expected 0 < smallest <= largest$"):
        parse_config(ImageCodecConfig, "crop_ratio: [2.0, 1.0]", "run.yaml")
