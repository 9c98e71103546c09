"""What every clip of the real media holds, or why it holds none of it.

Frames and decoded samples are those that PyAV alone decodes from begin to end; an independent count, since the codecs
tell frames and samples from packets. The clock of WebM counts milliseconds, and of one file packets are missing, so
that the samples of a track may be some more or fewer than those decoded.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    rate: int
    channels: int
    samples: int
    """Per channel, from the first to the last moment of the track."""
    decoded: int
    """Samples that come out of the decoder."""


@dataclass(frozen=True)
class Clip:
    frames: int
    seconds: float
    sound: Sound | str
    """Or the reason why there is none."""


CLIPS = {
    "big_buck_bunny_0_30.webm": Clip(720, 29.999, Sound(44_100, 2, 1_323_970, 1_323_840)),
    "big_buck_bunny_432_433.webm": Clip(24, 0.999, Sound(44_100, 2, 44_453, 44_352)),
    "chaplin.mp4": Clip(241, 9.64, Sound(44_100, 2, 423_983, 423_983)),
    "example.mp4": Clip(50, 2.0, "the file has no audio"),
    "example2.mp4": Clip(48, 2.0, Sound(44_100, 2, 88_751, 88_751)),
    "fire2.mp4": Clip(25, 2.38, Sound(48_000, 1, 115_991, 108_544)),  # a gap of 0.155 s
    "no_duration.webm": Clip(74, 4.938, Sound(48_000, 2, 233_232, 233_280)),
    "video_with_failing_audio.mp4": Clip(280, 11.2, Sound(44_100, 2, 495_407, 495_407)),
}
