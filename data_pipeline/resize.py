"""Images made smaller once, so that no epoch decodes pixels that training throws away.

Enter: the bytes of an image and the longest its shorter side may be. Leave: a JPEG of that size, upright, or None for
an image that is small enough, which stays as it is. Refused, as a SampleError: what cannot be decoded.
"""

from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from mmpretrain.core.image_bytes import read_header

MAX_PIXELS = 178_956_970
"""Where Pillow itself refuses to decode."""
_MARGIN = 2
"""Oversampling kept where the decoder shrinks by itself: 51 dB and more against full decoding."""


@dataclass(frozen=True)
class Resize:
    """What `data pack --resize` asks for."""

    shorter: int
    """Pixels of the shorter side."""
    quality: int
    """Of the JPEG, 1 to 95."""


@dataclass(frozen=True)
class Resized:
    content: bytes
    """A JPEG."""
    width: int
    """Of the original, upright."""
    height: int


def shrink(content: bytes, wanted: Resize) -> Resized | None:
    """The image with its shorter side at the wanted length; None where it is no longer than that."""
    image = read_header(content, MAX_PIXELS)
    shorter = min(image.width, image.height)
    if shorter <= wanted.shorter:
        return None
    scale = wanted.shorter / shorter
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    decoder_shrinks = max((by for by in (8, 4, 2, 1) if shorter // by >= _MARGIN * wanted.shorter), default=1)
    pixels = Image.fromarray(image.read(decoder_shrinks))
    buffer = BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=wanted.quality)
    return Resized(buffer.getvalue(), image.width, image.height)
