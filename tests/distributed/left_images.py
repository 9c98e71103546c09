"""One rank of the check that an engine decodes what workers left to the device: JPEGs, and Pillow's pixels of them."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import engine_cases as cases
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpretrain.core.types import Batch, FieldSpec
from mmpretrain.modalities.image import ImageCodec, ImageCodecConfig
from mmpretrain.modalities.images_on_gpu import GpuImageCodec


def left_images(folder: Path) -> None:
    """The losses of a step on JPEGs, and of one on Pillow's pixels of them."""
    for name, prepare in (("pixels", _with_pixels), ("jpegs", _with_jpegs)):
        for _, engine in cases.engines("spanning", [2], [1]):
            batches = [prepare(one) for one in cases.micro_batches(engine.config, 0)]
            result = engine.step(batches, cases.LR)
            told = {key: float(value) for key, value in result.losses.items()}
            (folder / f"{name}-{cases.rank()}.json").write_text(json.dumps(told))


def _with_pixels(batch: Batch) -> Batch:
    pixels = [np.array(Image.open(BytesIO(jpeg))).transpose(2, 0, 1) for jpeg in map(_jpeg, batch.tensors["image"])]
    return replace(batch, tensors=batch.tensors | {"image": torch.from_numpy(np.stack(pixels))})


def _with_jpegs(batch: Batch) -> Batch:
    config = ImageCodecConfig(decode="gpu", max_jpeg_bytes=4096, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    codec = GpuImageCodec(ImageCodec(cases.IMAGE, cases.IMAGE, config))
    assert codec.cpu.fields["image"] == FieldSpec((3, cases.IMAGE, cases.IMAGE), "uint8")
    rows = [codec.decode({"jpg": _jpeg(image)}, np.random.default_rng(0)) for image in batch.tensors["image"]]
    left = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in codec.fields}
    assert not left["image"].any(), "the pixels are left to the device"
    return replace(batch, tensors=batch.tensors | left)


def _jpeg(image: Tensor) -> bytes:
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()
