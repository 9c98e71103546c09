"""The synthetic videos: one coloured shape that moves across a noisy ground, and sentences about it.

Enter: a random generator and a pair (colour, shape). Leave: an MP4 of eight frames in one second, captions and what
they tell. A single frame shows colour and shape; only several show the motion. Refused: a machine without PyAV.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shapes import PAIRS, add_noise, draw_look, paint
from mmpretrain.core.containers import require

MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Direction of one step, from the top left."""
TEMPLATES = (
    "a {colour} {shape} moving {motion}",
    "a video of a {colour} {shape} moving {motion}",
    "the {shape} moving {motion} is {colour}",
    "a {colour} {shape} is moving {motion} in the video",
    "moving {motion} there is a {colour} {shape}",
)
PROMPTS = ("a {}", "a video of a {}")
"""Templates for zero-shot classification; {} is a class name such as "red circle moving left"."""
FRAMES = 8
FRAME_RATE = 8
RADII = (0.22, 0.28)
"""Radius as a fraction of the side of the picture."""
REACH = (0.17, 0.22)
"""How far from the middle a motion begins and ends, as a fraction of the side."""

CLASSES = tuple(f"{colour} {shape} moving {motion}" for colour, shape in PAIRS for motion in MOTIONS)


@dataclass(frozen=True)
class Clip:
    """What a video shows."""

    colour: str
    shape: str
    motion: str

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape} moving {self.motion}"

    def captions(self, draw: np.random.Generator, count: int) -> list[str]:
        """Sentences of different templates; each names colour, shape and motion."""
        chosen = draw.choice(len(TEMPLATES), size=count, replace=False)
        return [TEMPLATES[n].format(colour=self.colour, shape=self.shape, motion=self.motion) for n in chosen]


def draw_clip(pair: tuple[str, str], draw: np.random.Generator) -> Clip:
    return Clip(*pair, tuple(MOTIONS)[draw.integers(len(MOTIONS))])


def film(clip: Clip, side: int, draw: np.random.Generator) -> bytes:
    """An MP4 of `side` pixels; exact path, radius, angle, shade, ground and noise vary."""
    look = draw_look(clip.colour, RADII, draw)
    frames = [add_noise(paint(clip.shape, look, middle, side), draw) for middle in _path(clip.motion, draw)]
    return _encode(frames, side)


def _path(motion: str, draw: np.random.Generator) -> list[tuple[float, float]]:
    """The middle of the shape in each frame, in fractions of the side."""
    begin, end = 0.5 + np.array([[-1.0], [1.0]]) * draw.uniform(*REACH) * np.array(MOTIONS[motion])
    aside = draw.uniform(-0.06, 0.06, size=2)
    steps = np.linspace(begin, end, FRAMES) + aside
    return [(float(x), float(y)) for x, y in steps]


def _encode(frames: list[NDArray[np.uint8]], side: int) -> bytes:
    """MPEG-4 part 2, which FFmpeg encodes itself: the same bytes wherever its version is the same."""
    require("av", "video", "writing the synthetic videos")
    import av

    target = BytesIO()
    with av.open(target, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FRAME_RATE, options={"qscale": "3", "flags": "+bitexact+qscale"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()
