"""What a person hands over for one input, as the members a codec reads.

Enter: a path, bytes, a PIL image, pixels [H, W, 3], (samples, rate) of sound, (frames [T, H, W, 3], rate) of video, or
text. Leave: {extension: content}, the extension told by the content; arrays are written without loss. Refused, as a
SampleError: files that cannot be read, content of no known type, arrays of another shape or type.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from io import BytesIO
from numbers import Real
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mmpretrain.core.captions import usable_text
from mmpretrain.core.containers import require
from mmpretrain.core.errors import SampleError
from mmpretrain.core.image_bytes import eight_bits, orientation_of
from mmpretrain.core.media_types import sniff
from mmpretrain.core.types import Array

Timed = tuple[Array, float]
"""Samples [N] or [N, channels], or frames [T, H, W, 3] of uint8, and how many stand in a second."""
Media = str | Path | bytes | Image.Image | Array | Timed


def media_members(media: Media) -> Mapping[str, bytes]:
    """The one member that holds the media; a `str` is a path."""
    content = _content(media)
    extension = sniff(content)
    if extension is None:
        raise SampleError(f"its content is of no known media type; it begins with {content[:8]!r}")
    return {extension: content}


def text_of(media: Media) -> str:
    """A text; a `str` is the text itself, a `Path` a file of it."""
    if isinstance(media, str):
        text = media
    elif isinstance(media, Path | bytes):
        text = _decoded(_content(media))
    else:
        raise SampleError(f"saw {type(media).__name__}, expected text")
    if not text.strip():
        raise SampleError("the text is blank")
    return usable_text(text)


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is not UTF-8: {error}") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path} cannot be read: {error.strerror}") from error


def _content(media: Media) -> bytes:
    if isinstance(media, bytes):
        return media
    if isinstance(media, str | Path):
        return read_file(Path(media))
    if isinstance(media, Image.Image):
        return _png(media)
    if isinstance(media, np.ndarray):
        return _png(_picture(media))
    if isinstance(media, tuple) and len(media) == 2 and isinstance(media[0], np.ndarray):
        return _timed(*media)
    raise SampleError(
        f"saw {type(media).__name__}, expected a path, bytes, an image, pixels [H, W, 3], (samples, rate) or "
        "(frames [T, H, W, 3], rate)"
    )


def _picture(pixels: Array) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise SampleError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [height, width, 3]")
    return Image.fromarray(pixels)


def _png(image: Image.Image) -> bytes:
    buffer, exif, plain = BytesIO(), Image.Exif(), eight_bits(image)
    exif[ExifTags.Base.Orientation] = orientation_of(image)
    plain = plain if plain.mode in ("L", "RGB", "RGBA", "P") else plain.convert("RGB")
    plain.save(buffer, "PNG", compress_level=1, exif=exif)
    return buffer.getvalue()


def _timed(values: Array, rate: float) -> bytes:
    if not (isinstance(rate, Real) and math.isfinite(rate) and round(rate, 3) > 0):
        raise SampleError(f"the rate is {rate!r}, expected samples or frames per second")
    if values.ndim in (1, 2) and values.dtype in (np.int16, np.float32, np.float64):
        return _wav(values, max(1, round(rate)))
    if values.ndim == 4 and values.dtype == np.uint8 and values.shape[3] == 3:
        return _clip(values.astype(np.uint8, copy=False), rate)
    raise SampleError(
        f"values with a rate are {values.dtype} {list(values.shape)}, expected samples, int16 or float [N] or "
        "[N, channels], or frames, uint8 [T, height, width, 3]"
    )


def _wav(samples: Array, rate: int) -> bytes:
    require("soundfile", "audio", "reading sound")
    import soundfile

    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        raise SampleError(f"samples are {list(samples.shape)}, expected [N, channels]; transpose them")
    buffer = BytesIO()
    kept = samples if samples.dtype == np.int16 else samples.astype(np.float32)
    subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"
    soundfile.write(buffer, kept, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def _clip(frames: NDArray[np.uint8], rate: float) -> bytes:
    """Matroska with FFV1, which keeps every bit of RGB."""
    require("av", "video", "reading videos")
    import av

    buffer, per_second = BytesIO(), Fraction(float(rate)).limit_denominator(1001)
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=per_second)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, 1 / per_second
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
