"""Bytes of a video into some of its frames, upright, told by its first bytes and not by its name.

Enter: the content of a member. Leave: its size and the times of all its frames, and when asked the frames [T, H, W, 3]
uint8 that are shown at given times. Refused, as a SampleError: what holds no pictures, is damaged or cut off, too long,
of too many frames or pixels, or of frames of several sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from mmpretrain.core.containers import Track, header_seconds, open_container, require_codec, scan
from mmpretrain.core.errors import SampleError

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

Frames = NDArray[np.uint8]

_PADDED = 2
"""Sizes are coded in whole blocks, so a frame takes somewhat more pixels than it shows."""
_EDGES = 2**20
"""Pixels that FFmpeg counts beside those of a frame, whatever its size."""


@dataclass(frozen=True)
class VideoLimits:
    """What is refused from the header, before anything is decoded."""

    max_pixels: int
    """Per frame."""
    max_seconds: float
    max_frames: int

    def check(self, width: int, height: int, seconds: float | None, frames: int) -> None:
        if width * height > self.max_pixels:
            raise SampleError(f"the video has {width} x {height} pixels, more than max_pixels {self.max_pixels}")
        if seconds is not None and seconds > self.max_seconds:
            raise SampleError(f"the video lasts {seconds:.1f} s, longer than max_seconds {self.max_seconds:g}")
        if frames > self.max_frames:
            raise SampleError(f"the video has {frames} frames, more than max_frames {self.max_frames}")


@dataclass(frozen=True)
class OpenVideo:
    """A video whose frames can be decoded while it is open."""

    container: InputContainer
    stream: VideoStream
    track: Track
    max_pixels: int

    @property
    def num_frames(self) -> int:
        return len(self.track.ticks)

    @property
    def seconds(self) -> float:
        return self.track.seconds

    def frames_at(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        """The numbers of the frames shown at these times, in seconds from the first frame."""
        ticks = self.track.ticks[0] + np.floor(times / float(self.track.time_base) + 1e-6)
        numbers: NDArray[np.int64] = np.searchsorted(self.track.ticks, ticks, side="right") - 1
        return np.clip(numbers, 0, self.num_frames - 1)

    def read(self, numbers: NDArray[np.int64]) -> Frames:
        """Frames by number, upright RGB [T, H, W, 3]; numbers in rising order, and may repeat."""
        convert = _converter()
        shown = {number: self._pixels(frame, convert) for number, frame in self._decode(numbers)}
        sizes = sorted({pixels.shape[1::-1] for pixels in shown.values()})
        if len(sizes) > 1:
            named = " and ".join(f"{width} x {height}" for width, height in sizes)
            raise SampleError(f"the video has frames of {named} pixels, and one size is read")
        return np.stack([shown[number] for number in numbers.tolist()])

    def _decode(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame]]:
        """(number, frame) for each number, decoded from the nearest key frame before it."""
        for key, group in groupby(np.unique(numbers).tolist(), self._key_before):
            self.container.seek(int(self.track.ticks[key]), stream=self.stream)
            yield from self._shown(self.container.decode(self.stream), list(group))

    def _key_before(self, number: int) -> int:
        """The number of the last key frame up to this frame."""
        keys = np.flatnonzero(self.track.is_key[: number + 1])
        return int(keys[-1]) if len(keys) else 0

    def _shown(self, frames: Iterable[VideoFrame], group: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """For each number the frame of its tick; the one before it where a packet shows nothing of its own."""
        last: VideoFrame | None = None
        pending = deque(group)
        for frame in frames:
            while pending and frame.pts is not None and frame.pts >= self.track.ticks[pending[0]]:
                yield pending[0], frame if last is None or frame.pts == self.track.ticks[pending[0]] else last
                pending.popleft()
            if not pending:
                return
            last = frame
        if last is None:
            raise SampleError("the video cannot be decoded: no frame comes out")
        for number in pending:
            yield number, last

    def _pixels(self, frame: VideoFrame, convert: VideoReformatter) -> Frames:
        if frame.width * frame.height > self.max_pixels:
            raise SampleError(
                f"the video has a frame of {frame.width} x {frame.height} pixels, more than max_pixels "
                f"{self.max_pixels}"
            )
        pixels = cast(Frames, convert.reformat(frame, format="rgb24", threads=1).to_ndarray())
        return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _converter() -> VideoReformatter:
    """One for all frames of a video, since setting it up takes longer than a small frame; used with one thread, since
    workers share the cores already."""
    from av.video.reformatter import VideoReformatter  # loads FFmpeg

    return VideoReformatter()


@contextmanager
def open_video(content: bytes, limits: VideoLimits) -> Iterator[OpenVideo]:
    """A video whose header and times of packets do not exceed the limits; nothing of it is decoded yet."""
    with open_container(content, "video") as container:
        if not container.streams.video:
            raise SampleError("the file has no video")
        stream = container.streams.video[0]
        require_codec(stream, "video")
        context = stream.codec_context
        limits.check(context.width, context.height, header_seconds(container), stream.frames)
        track = scan(container, stream, "video", limits.max_frames)
        limits.check(context.width, context.height, track.seconds, len(track.ticks))
        context.thread_count = 1  # workers share the cores already
        most = _PADDED * limits.max_pixels + _EDGES
        context.options = {"max_pixels": str(most)}  # refused before memory is taken
        yield OpenVideo(container, stream, track, limits.max_pixels)
