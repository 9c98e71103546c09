"""What a file holds, by its first bytes and never by its name, and whether it can be decoded.

Enter: the bytes of a media file. Leave: the extension that tells the truth. Refused, as a SampleError: content of no
known type, images that cannot be decoded to their last pixel.
"""

from mmpretrain.core.errors import SampleError
from mmpretrain.core.image_bytes import opened_image
from mmpretrain.core.media_types import IMAGE_EXTENSIONS, MEDIA_EXTENSIONS, sniff


def usable_extension(content: bytes) -> str:
    """The extension to store a media file under; SampleError says why it cannot be stored."""
    if not content:
        raise SampleError("the file is empty")
    extension = sniff(content)
    if extension is None:
        raise SampleError(f"its content is of no known media type; it begins with {content[:16]!r}")
    if extension not in MEDIA_EXTENSIONS:
        raise SampleError(f"its content is {extension}, which is not read; convert it to jpg or png")
    if extension in IMAGE_EXTENSIONS:
        decode_whole(content)
    return extension


def decode_whole(content: bytes) -> None:
    """Decode every pixel of an image; SampleError says why that cannot be done."""
    with opened_image(content) as image:
        image.load()
