"""JPEGs that workers leave to the GPU: their bytes and what is seen of them cross, and become pixels on the device.

Enter: image members, in a worker; batches with bytes beside pixels, on the device. Leave: batches as the CPU decodes
them, up to rounding. Refused: an image that neither the GPU nor the CPU can decode.

Only whole, ordinary JPEGs are left to the GPU, which paints what is cut off in grey and says nothing: all else is
decoded, refused or replaced in the worker.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.image_bytes import EncodedImage, read_header
from mmpretrain.core.types import Array, Codec, FieldSpec, TensorDict
from mmpretrain.modalities.base import PresenceCodec
from mmpretrain.modalities.image import ImageCodec, View

BYTES, VIEW = "image.jpeg", "image.view"
"""Fields of a batch beside "image": JPEGs [B, max_jpeg_bytes], and of each [B, 8] what `_numbers` tells; their length
is 0 where the pixels are there already."""
_PIXELS_AT_ONCE = 2**26
"""Decoded before they are resized: 200 MB."""
_END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class GpuImageCodec:
    """`ImageCodec` that leaves ordinary JPEGs of training to the device. Evaluation decodes on the CPU everywhere, so
    that its figures do not depend on the machine."""

    cpu: ImageCodec

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        room = FieldSpec((self.cpu.config.max_jpeg_bytes,), "uint8")
        return {**self.cpu.fields, BYTES: room, VIEW: FieldSpec((8,), "int32")}

    @property
    def extensions(self) -> frozenset[str]:
        return self.cpu.extensions

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        """What the CPU decodes, or zeros in its place and the bytes."""
        arrays: dict[str, Array] = {name: np.zeros(spec.shape, spec.dtype) for name, spec in self.fields.items()}
        if draw is None:
            return arrays | self.cpu.decode(members, None)
        image = self.cpu.header(members)
        view = self.cpu.draw_view(image, draw)
        if not self._can_be_left(image):
            return arrays | {"image": self.cpu.pixels(image, view)}
        arrays[BYTES][: len(image.content)] = np.frombuffer(image.content, np.uint8)
        return arrays | {VIEW: _numbers(image, view)}

    def _can_be_left(self, image: EncodedImage) -> bool:
        content = image.content
        if not image.plain_jpeg or len(content) > self.cpu.config.max_jpeg_bytes or content[-2:] != _END_OF_IMAGE:
            return False
        *_, colours, _ = simplejpeg.decode_jpeg_header(content)
        return bool(colours != "RGB")  # nvJPEG takes every three colours for YCbCr


def leave_to_gpu(codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """The codecs of a training run on a CUDA device: those that are asked to leave their JPEGs to it do."""
    return {name: _left(codec) for name, codec in codecs.items()}


def _left(codec: Codec) -> Codec:
    if not isinstance(codec, PresenceCodec) or codec.kept is not None or not isinstance(codec.decoder, ImageCodec):
        return codec
    return replace(codec, decoder=GpuImageCodec(codec.decoder)) if codec.decoder.config.decode == "gpu" else codec


def decode_left(tensors: TensorDict, keys: Sequence[str], device: torch.device) -> TensorDict:
    """The batch with every image as uint8 pixels on the device; `keys` name its samples.

    Raises DataError for an image that cannot be decoded.
    """
    if BYTES not in tensors:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in (BYTES, VIEW)}
    images = rest["image"].to(device, non_blocking=True)
    for rows in _portions(tensors[VIEW]):
        encoded = [tensors[BYTES][row, : int(tensors[VIEW][row, 0])] for row in rows]
        names = [keys[row] if keys else f"row {row}" for row in rows]
        for row, pixels in zip(rows, _decoded(encoded, names, device), strict=True):
            images[row] = _seen(pixels, tensors[VIEW][row].tolist(), images.shape[-2], images.shape[-1])
    return rest | {"image": images}


def _numbers(image: EncodedImage, view: View) -> Array:
    """Length in bytes, EXIF orientation, whether it is mirrored, pixels of the upright image, and the box of it."""
    box = view.box
    numbers = (len(image.content), image.orientation, view.mirrored, image.height * image.width)
    return np.array([*numbers, box.top, box.left, box.height, box.width], np.int32)


def _portions(views: Tensor) -> Iterator[list[int]]:
    """Rows that have bytes, in groups that are decoded at once."""
    rows, room = list[int](), _PIXELS_AT_ONCE
    for row in views[:, 0].nonzero().flatten().tolist():
        pixels = int(views[row, 3])
        if rows and pixels > room:
            yield rows
            rows, room = [], _PIXELS_AT_ONCE
        rows.append(row)
        room -= pixels
    if rows:
        yield rows


def _decoded(encoded: Sequence[Tensor], names: Sequence[str], device: torch.device) -> list[Tensor]:
    """Pixels [3, H, W] as they are stored; one by one on the CPU where the device refuses any of them."""
    from torchvision.io import ImageReadMode, decode_jpeg  # loads much; only runs with such images need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchCodec will follow it
        try:
            pixels: list[Tensor] = decode_jpeg(list(encoded), ImageReadMode.RGB, device)
        except RuntimeError:
            pixels = [_decoded_here(one, name).to(device) for one, name in zip(encoded, names, strict=True)]
    return pixels


def _decoded_here(encoded: Tensor, name: str) -> Tensor:
    try:
        image = read_header(encoded.numpy().tobytes(), sys.maxsize)  # the worker knew the limit
        pixels = replace(image, orientation=1).read()
    except SampleError as error:
        raise DataError(
            f"sample {name}: {error}; data.codecs.image.decode: cpu replaces such samples, and "
            f"`mmpretrain data check` finds them"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _seen(pixels: Tensor, numbers: Sequence[int], height: int, width: int) -> Tensor:
    """The box of the upright image as uint8 [3, height, width], bicubic with antialiasing, mirrored where it is."""
    _, orientation, mirrored, _, top, left, rows, columns = numbers
    part = _upright(pixels, orientation)[:, top : top + rows, left : left + columns]
    size = (height, width)
    resized = functional.interpolate(part.unsqueeze(0).float(), size=size, mode="bicubic", antialias=True)[0]
    result = resized.round().clamp(0, 255).to(torch.uint8)
    return result.flip(-1) if mirrored else result


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation of [3, H, W]."""
    if orientation > 4:
        pixels = pixels.transpose(1, 2)
    axes = [axis for axis, turned in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in turned]
    return pixels.flip(axes)
