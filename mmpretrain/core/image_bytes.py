"""Bytes of an image file into pixels, fast where it is a JPEG, told by its first bytes and not by its name.

Enter: the content of an image member. Leave: its upright size, and when asked its pixels [H, W, 3] uint8, decoded
at 1/2, 1/4 or 1/8 where that suffices. Refused, as a SampleError: what is no image, is cut off or has too many pixels
or scans. Every image of this project is opened here: of the other formats that Pillow knows, some run programs.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mmpretrain.core.errors import SampleError

Pixels = NDArray[np.uint8]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_PLAIN_COLOURS = frozenset({"YCbCr", "RGB", "Gray"})
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    MemoryError,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on damaged files."""
_MAX_SCANS = 100
"""Of a JPEG; encoders write 1 or some 10. Each may go over all pixels, so a small file of many decodes for hours."""
_START_OF_SCAN = b"\xff\xda"
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_MAX_SEGMENTS = 1000
"""Looked at before the first scan."""


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header was read; height and width are those of the upright image."""

    content: bytes
    height: int
    width: int
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    plain_jpeg: bool
    """A JPEG that the fast decoder turns into the same pixels as Pillow."""

    def read(self, shrink: int = 1) -> Pixels:
        """The upright pixels; a plain JPEG is decoded at 1 / shrink of its size, others at full size."""
        pixels = self._read_jpeg(shrink) if self.plain_jpeg else None
        return _upright(_read_pillow(self.content) if pixels is None else pixels, self.orientation)

    def _read_jpeg(self, shrink: int) -> Pixels | None:
        height, width = (self.width, self.height) if self.orientation > 4 else (self.height, self.width)
        least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self.content, **least)
        except ValueError:
            return None  # harmless oddities too, such as bytes behind the end; Pillow tells them from damage
        return pixels


def read_header(content: bytes, max_pixels: int) -> EncodedImage:
    """Look at an image's header, and refuse more than `max_pixels` before anything is decoded."""
    image = _jpeg_header(content) or _pillow_header(content)
    if image.height * image.width > max_pixels:
        raise SampleError(f"the image has {image.width} x {image.height} pixels, more than max_pixels {max_pixels}")
    return image


@contextmanager
def opened_image(content: bytes) -> Iterator[Image.Image]:
    """Pillow's image, of which nothing is decoded yet; what goes wrong while it is open becomes a SampleError."""
    _refuse_scans(content)
    done = "opened"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF, and of its own pixel limit
            with Image.open(BytesIO(content), formats=_FORMATS) as image:
                done = "decoded"
                yield image
    except _DAMAGED as error:
        raise SampleError(f"the image cannot be {done}: {_reason(error)}") from error


def _refuse_scans(content: bytes) -> None:
    if content.startswith(b"\xff\xd8") and not _is_one_scan(content):
        scans = content.count(_START_OF_SCAN)
        if scans > _MAX_SCANS:
            raise SampleError(f"the image is a JPEG of {scans} scans, more than {_MAX_SCANS}")


def _is_one_scan(content: bytes) -> bool:
    """Whether the first scan of a JPEG holds all of it, as far as its headers can be read."""
    position, components = 2, 0
    for _ in range(_MAX_SEGMENTS):
        if position + 10 > len(content) or content[position] != 0xFF:
            return False
        marker = content[position + 1]
        if marker in _SEQUENTIAL:
            components = content[position + 9]
        elif marker == _START_OF_SCAN[1]:
            return components > 0 and content[position + 4] == components
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def _jpeg_header(content: bytes) -> EncodedImage | None:
    """The header of a JPEG in the usual colours; None for others, and for damage that Pillow shall explain."""
    if not content.startswith(b"\xff\xd8"):
        return None
    _refuse_scans(content)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in _PLAIN_COLOURS:
        return None
    orientation = _pillow_header(content).orientation if b"Exif\0\0" in content else 1
    height, width = (width, height) if orientation > 4 else (height, width)
    return EncodedImage(content, height, width, orientation, plain_jpeg=True)


def _pillow_header(content: bytes) -> EncodedImage:
    with opened_image(content) as image:
        orientation = orientation_of(image)
        width, height = image.size[::-1] if orientation > 4 else image.size
    return EncodedImage(content, height, width, orientation, plain_jpeg=False)


def orientation_of(image: Image.Image) -> int:
    """By EXIF, 1 to 8; 1 is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1  # viewers ignore unreadable metadata as well
    return orientation if orientation in range(1, 9) else 1


def _read_pillow(content: bytes) -> Pixels:
    with opened_image(content) as image:
        return np.array(eight_bits(image).convert("RGB"))  # a copy: PyTorch wants writable memory


def eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey to white when it converts; keep the high byte instead. 32 bits could mean anything."""
    if image.mode in ("I", "F"):
        raise SampleError(f"the image has pixels of 32 bits (mode {image.mode}), whose range is not known")
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _reason(error: BaseException) -> str:
    """Pillow's message without the address of its buffer."""
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return "of no known format" if "BytesIO" in str(error) else str(error)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation; a view."""
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]
