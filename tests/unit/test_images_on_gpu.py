"""Images that workers leave to the device: the same pixels as the CPU's codec, and nothing damaged is left to it."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from test_image_codec import encode, gradient, psnr

from data_pipeline.collate import BatchRows
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.types import Array, Codec, FieldSpec, TensorDict
from mmpretrain.modalities.image import ImageCodecConfig
from mmpretrain.modalities.images_on_gpu import BYTES, VIEW, decode_left, leave_to_gpu

CPU = torch.device("cpu")
SIZE = 64


def codecs(**fields: object) -> tuple[Codec, Codec]:
    """As the CPU decodes all, and as training leaves it."""
    config = ImageCodecConfig(decode="gpu", **fields)  # type: ignore[arg-type]
    codec = config.codec({"image": FieldSpec((3, SIZE, SIZE), "uint8")}, None)
    return codec, leave_to_gpu({"image": codec})["image"]


def batch(codec: Codec, rows: list[dict[str, Array]]) -> TensorDict:
    filled = BatchRows({"image": codec}, len(rows))
    for number, row in enumerate(rows):
        filled.put(number, row)
    return filled.tensors(len(rows))


def both(members: list[Mapping[str, bytes]], device: torch.device = CPU, **fields: object) -> tuple[Array, Array, int]:
    """Pixels as the CPU's codec and as the device makes them, and how many were left to the device."""
    cpu, left = codecs(**fields)
    wanted = [cpu.decode(one, np.random.default_rng(seed))["image"] for seed, one in enumerate(members)]
    tensors = batch(left, [left.decode(one, np.random.default_rng(seed)) for seed, one in enumerate(members)])
    count = int((tensors[VIEW][:, 0] > 0).sum())
    decoded = decode_left(tensors, (), device)
    assert decoded.keys() == {"image", "image.present"} and decoded["image"].device.type == device.type
    return decoded["image"].cpu().numpy(), np.stack(wanted), count


def close(seen: Array, wanted: Array, least: float) -> None:
    assert seen.shape == wanted.shape and seen.dtype == wanted.dtype
    assert min(psnr(one, other) for one, other in zip(seen, wanted, strict=True)) >= least


def photos(shared_data: Path) -> list[Mapping[str, bytes]]:
    paths = sorted((shared_data / "flickr1k" / "images").iterdir())[:24]
    return [{"jpg": path.read_bytes()} for path in paths]


def test_photos_come_out_as_the_cpu_decodes_them(shared_data: Path) -> None:
    seen, wanted, left = both(photos(shared_data), flip=True, crop_scale=(0.2, 1.0))
    close(seen, wanted, 45)  # the CPU decodes some at a fraction of their size
    assert left == len(wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_photos_come_out_of_nvjpeg_as_the_cpu_decodes_them(shared_data: Path) -> None:
    seen, wanted, left = both(photos(shared_data), torch.device("cuda"), flip=True, crop_scale=(0.2, 1.0))
    close(seen, wanted, 40)
    assert left == len(wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_view_is_of_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(gradient(96, 80), quality=95, exif=exif)
    seen, wanted, left = both([{"jpg": content}] * 4, flip=True, crop_scale=(0.2, 0.6))
    close(seen, wanted, 50)
    assert left == 4


def test_many_large_images_are_decoded_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpretrain.modalities.images_on_gpu._PIXELS_AT_ONCE", 3 * 96 * 80)
    members = [{"jpg": encode(gradient(96, 80).rotate(angle))} for angle in range(8)]
    seen, wanted, left = both(members)
    close(seen, wanted, 50)
    assert left == 8


def test_what_is_no_ordinary_jpeg_is_decoded_in_the_worker() -> None:
    whole = encode(gradient(640, 480), quality=95)
    red_green_blue = encode(gradient(), keep_rgb=True)
    members = [
        {"png": encode(gradient(), "PNG")},
        {"jpg": encode(gradient().convert("CMYK"))},
        {"jpg": red_green_blue},
        {"jpg": whole + b"behind the end"},
        {"jpg": encode(Image.effect_noise((640, 480), 80), quality=95)},
    ]
    assert len(members[-1]["jpg"]) > 2**16
    seen, wanted, left = both(members, max_jpeg_bytes=2**16)
    assert np.array_equal(seen, wanted) and left == 0


def test_a_cut_image_is_refused_in_the_worker_as_ever() -> None:
    content = encode(gradient(640, 480))
    with pytest.raises(SampleError, match="cannot be decoded"):
        codecs()[1].decode({"jpg": content[: len(content) // 2]}, np.random.default_rng(0))


def test_an_image_that_no_decoder_reads_is_named() -> None:
    _, left = codecs()
    content = bytearray(encode(gradient(640, 480)))
    content[content.index(b"\xff\xda") + 6] = 0x33  # its first component wants Huffman codes that are not there
    tensors = batch(left, [left.decode({"jpg": bytes(content)}, np.random.default_rng(0))])
    with pytest.raises(DataError, match=r"sample a/7: the image cannot be decoded: .*; data.codecs.image.decode: cpu"):
        decode_left(tensors, ("a/7",), CPU)


def test_one_image_that_the_device_refuses_does_not_spoil_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of the device that takes no batch with a certain image, as nvJPEG takes none it cannot all decode."""
    members = [{"jpg": encode(gradient().rotate(angle))} for angle in range(3)]
    refused = members[1]["jpg"]
    decode = torchvision.io.decode_jpeg

    def device_decode(encoded: list[torch.Tensor], mode: torchvision.io.ImageReadMode, device: torch.device) -> object:
        if any(one.numpy().tobytes() == refused for one in encoded):
            raise RuntimeError("nvjpegDecodeBatched failed")
        return decode(encoded, mode, device)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", device_decode)
    seen, wanted, left = both(members)
    close(seen, wanted, 50)
    assert left == 3


def test_evaluation_decodes_on_the_cpu() -> None:
    cpu, left = codecs()
    content = {"jpg": encode(gradient())}
    row = left.decode(content, None)
    assert np.array_equal(row["image"], cpu.decode(content, None)["image"]) and row[VIEW][0] == 0
    assert not row[BYTES].any()


def test_only_codecs_that_are_asked_to_leave_images() -> None:
    inputs = {"image": FieldSpec((3, SIZE, SIZE), "uint8")}
    for config in (ImageCodecConfig(), ImageCodecConfig(decode="gpu", keep=True)):
        codec = config.codec(inputs, None)
        assert leave_to_gpu({"image": codec}) == {"image": codec}


def test_images_of_the_batch_are_upright_pillow_pixels() -> None:
    """Against Pillow alone: an image of the size the model wants, whole."""
    content = encode(gradient(SIZE, SIZE), quality=95)
    seen, _, left = both([{"jpg": content}], crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    wanted = np.asarray(Image.open(BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert left == 1 and np.array_equal(seen[0], wanted)
