"""Containers of timed media (MP4, WebM, AVI, ...) opened with PyAV, and where the packets of a stream lie in time.

Enter: the content of a member. Leave: an open container, and a `Track` of one of its streams, exact for files whose
header tells no duration too. Refused, as a SampleError: what is no container, damaged, cut off or longer than allowed.
Only the demuxer of the sniffed type is tried, so that no playlist can make FFmpeg open other files or addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.media_types import sniff

if TYPE_CHECKING:
    from av import AudioStream, CodecContext, VideoStream
    from av.container import InputContainer

_DEMUXERS = {
    "mp4": "mp4",
    "m4a": "mp4",
    "mov": "mp4",
    "webm": "matroska",
    "mkv": "matroska",
    "avi": "avi",
    "wav": "wav",
    "mp3": "mp3",
    "flac": "flac",
    "ogg": "ogg",
}
_EXACT_DURATION = frozenset({"mp4", "matroska", "avi"})
"""Formats whose header tells the duration; of others FFmpeg guesses it from the bit rate."""
_MOST_MISSING = 0.1
"""Share of the duration, and seconds upon it, by which sound headers exceed the last packet."""


@dataclass(frozen=True)
class Track:
    """When the packets of one stream are shown or heard."""

    ticks: NDArray[np.int64]
    """[packets] In rising order."""
    is_key: NDArray[np.bool_]
    """[packets] Decoding can begin there."""
    end: int
    """Tick at which the last packet ends."""
    time_base: Fraction
    """Seconds per tick."""

    @property
    def seconds(self) -> float:
        return float((self.end - int(self.ticks[0])) * self.time_base)


def require(module: str, extra: str, purpose: str) -> None:
    """Refuse to go on without an optional library."""
    if find_spec(module) is None:
        raise ConfigError(f"{purpose} needs {module}, which is not installed; run pip install 'mmpretrain[{extra}]'")


@contextmanager
def open_container(content: bytes, what: str) -> Iterator[InputContainer]:
    """The container of this content; errors of FFmpeg while it is open become SampleErrors about `what`."""
    require("av", "video", f"decoding this {what}")
    import av  # loads FFmpeg; workers of runs without video do without

    demuxer = _DEMUXERS.get(sniff(content) or "")
    if demuxer is None:
        raise SampleError(f"the {what} is of no known format; it begins with {content[:8]!r}")
    try:
        with av.open(BytesIO(content), "r", format=demuxer, metadata_errors="ignore") as container:
            yield container
    except av.FFmpegError as error:
        raise SampleError(f"the {what} cannot be decoded: {error.strerror}") from error


def require_codec(stream: VideoStream | AudioStream, what: str) -> None:
    """Refuse a stream of a kind that this FFmpeg cannot decode; PyAV gives it no codec at all."""
    context: CodecContext | None = stream.codec_context
    if context is None:
        raise SampleError(f"the {what} cannot be decoded: its codec is not known here")


def header_seconds(container: InputContainer) -> float | None:
    """The duration that the header tells; None where it tells none."""
    return None if container.duration is None else container.duration / 1e6


def scan(container: InputContainer, stream: VideoStream | AudioStream, what: str, max_packets: int) -> Track:
    """Read the times of all packets without decoding any, and return to the begin."""
    keys: dict[int, bool] = {}
    end, reached = 0, 0.0
    for packet in container.demux():
        tick = packet.dts if packet.pts is None else packet.pts
        if tick is None or not packet.size or packet.time_base is None:
            continue
        until = tick + (packet.duration or 0)
        reached = max(reached, float(until * packet.time_base))
        if packet.stream.index != stream.index or packet.is_discard:
            continue
        keys[tick] = packet.is_keyframe
        end = max(end, until)
        if len(keys) > max_packets:
            raise SampleError(f"the {what} has more than {max_packets} frames")
    _refuse_cut(container, what, reached)
    if not keys or stream.time_base is None:
        raise SampleError(f"the {what} has no frames")
    ticks = np.array(sorted(keys), np.int64)
    container.seek(int(ticks[0]), stream=stream)
    return Track(ticks, np.array([keys[tick] for tick in ticks.tolist()]), _end(ticks, end), stream.time_base)


def _end(ticks: NDArray[np.int64], end: int) -> int:
    """The last packet may not say how long it lasts; then it lasts as long as the others do in the mean."""
    if end > ticks[-1]:
        return end
    return int(ticks[-1] + max(1, (ticks[-1] - ticks[0]) // max(1, len(ticks) - 1)))


def _refuse_cut(container: InputContainer, what: str, reached: float) -> None:
    told = header_seconds(container)
    if told is None or container.format.name not in _EXACT_DURATION:
        return
    begin = (container.start_time or 0) / 1e6
    if told - (reached - begin) > _MOST_MISSING * (1 + told):
        raise SampleError(f"the {what} is cut off: it ends at {reached - begin:.1f} s, its header says {told:.1f} s")
