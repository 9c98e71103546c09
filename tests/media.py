"""Small recordings and videos made for tests, in memory.

Enter: samples or frames. Leave: the bytes of a file, written by soundfile or PyAV.
"""

from contextlib import ExitStack
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import soundfile
from av import AudioStream
from av.container import OutputContainer
from numpy.typing import NDArray


def tone(seconds: float, rate: int, hertz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def recording(samples: NDArray[np.generic], rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """A file of samples [n] or [n, channels]."""
    buffer = BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def counting_frames(count: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] whose numbers stand in them as eight stripes, black or white, the lowest bit on top."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    stripes = np.repeat(bits.astype(np.uint8) * 255, height // 8, axis=1)
    return np.broadcast_to(stripes[:, :, None, None], (count, height, width, 3)).copy()


def numbers_of(clip: NDArray[np.uint8]) -> list[int]:
    """The numbers of `counting_frames` [T, H, W, 3] of any size."""
    rows = clip.mean(axis=(2, 3))
    stripes = rows.reshape(len(clip), 8, -1).mean(axis=2) > 127
    return [int(number) for number in stripes @ (1 << np.arange(8))]


def video(
    frames: NDArray[np.uint8],
    rate: int = 25,
    kind: str = "mp4",
    codec: str = "libx264",
    every_key: int = 10,
    sound: NDArray[np.float32] | None = None,
) -> bytes:
    """A file of frames [T, H, W, 3], with the sound, mono at 16 kHz, if any; lossless where the codec can be."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        options = {"crf": "1", "g": str(every_key)} if codec == "libx264" else {"g": str(every_key), "b": "2M"}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=16_000, layout="mono")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            _add_sound(container, track, sound)
    return buffer.getvalue()


def end_to_end(*videos: bytes) -> bytes:
    """One Matroska file of the packets of several videos, each a second after the one before, none encoded anew."""
    buffer = BytesIO()
    with ExitStack() as opened:
        container = opened.enter_context(av.open(buffer, "w", format="matroska"))
        parts = [opened.enter_context(av.open(BytesIO(content))) for content in videos]
        stream = container.add_stream_from_template(parts[0].streams.video[0])
        for second, part in enumerate(parts):
            for packet in part.demux(video=0):
                if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
                    packet.pts += int(second / packet.time_base)
                    packet.dts += int(second / packet.time_base)
                    packet.stream = stream
                    container.mux(packet)
    return buffer.getvalue()


def m4a(sound: NDArray[np.float32]) -> bytes:
    """A file of AAC, mono at 16 kHz."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="ipod") as container:
        _add_sound(container, container.add_stream("aac", rate=16_000, layout="mono"), sound)
    return buffer.getvalue()


def _add_sound(container: OutputContainer, track: AudioStream, sound: NDArray[np.float32]) -> None:
    frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
    container.mux(track.encode(frame))
    container.mux(track.encode(None))
