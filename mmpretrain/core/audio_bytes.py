"""Bytes of a recording, or of the sound of a video, into one channel of samples at any rate.

Enter: the content of a member, told by its first bytes and not by its name. Leave: its length, rate and channels, and
any stretch of it as float32. Refused, as a SampleError: what has no sound track (AbsentError), is damaged or cut off,
too long, of too many channels, of a rate that no recorder has. soundfile reads what it can; PyAV the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpretrain.core.containers import header_seconds, open_container, require, require_codec, scan
from mmpretrain.core.errors import AbsentError, SampleError
from mmpretrain.core.media_types import sniff

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream
    from av.container import InputContainer

Samples = NDArray[np.float32]

_SOUNDFILE_TYPES = frozenset({"wav", "mp3", "flac", "ogg"})
_MAX_PACKETS = 10_000_000
_PREROLL_S = 0.5
"""Decoded and thrown away after a jump: MP3 needs up to 9 frames before it, Opus 80 ms, AAC and Vorbis one frame."""
_CLOCK_ROUNDING_S = 0.02
_MAX_RATE = 768_000
"""Samples per second, the highest that recorders offer."""
_FILTER_REACH = 16
_STEEPEST = 100_000
"""Of two rates that share almost no divisor the filter has 32 times as many taps: a second's work, once."""
_FILTER_SHAPE = ("kaiser", 8.0)
_ROLL_OFF = 0.95
"""Pass band as a share of the lower of both Nyquist frequencies."""


@dataclass(frozen=True)
class AudioLimits:
    """What is refused from the header, before anything is decoded."""

    max_seconds: float
    max_channels: int

    def check(self, seconds: float | None, channels: int) -> None:
        if channels > self.max_channels:
            raise SampleError(f"the audio has {channels} channels, more than max_channels {self.max_channels}")
        if seconds is not None and seconds > self.max_seconds:
            raise SampleError(f"the audio lasts {seconds:.1f} s, longer than max_seconds {self.max_seconds:g}")


@dataclass(frozen=True)
class EncodedAudio(ABC):
    """A recording whose header was read."""

    content: bytes
    sample_rate: int
    channels: int
    num_samples: int
    """Per channel, at its own rate."""

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate

    @abstractmethod
    def read(self, begin: int, end: int) -> Samples:
        """The mean of the channels, samples `begin` to `end` at its own rate, as far as there are so many.

        Silence where a track that begins late or has gaps holds nothing.
        """

    def read_at(self, sample_rate: int, begin: int, length: int) -> Samples:
        """As `read`, at another rate: `length` samples from the `begin`-th, the very ones that resampling all of it
        would give; fewer where it ends."""
        if sample_rate == self.sample_rate:
            return self.read(begin, begin + length)
        common = math.gcd(sample_rate, self.sample_rate)
        up, down = sample_rate // common, self.sample_rate // common
        if max(up, down) > _STEEPEST:
            raise SampleError(f"the audio has {self.sample_rate} samples a second, which do not become {sample_rate}")
        margin = math.ceil(_FILTER_REACH * max(up, down) / up) + 1
        first = max(0, begin * down // up - margin) // down * down  # where samples of both rates coincide
        last = (begin + length) * down // up + margin
        resampled = _resample(self.read(first, last), up, down)
        return resampled[begin - first * up // down :][:length]


def read_header(content: bytes, limits: AudioLimits) -> EncodedAudio:
    """Look at a recording's header, and refuse what exceeds the limits before anything is decoded."""
    kind = sniff(content)
    found = _open_soundfile(content, kind, limits) if kind in _SOUNDFILE_TYPES else None
    found = found or _open_container(content, limits)
    if not 0 < found.sample_rate <= _MAX_RATE:
        raise SampleError(f"the audio has {found.sample_rate} samples a second, more than {_MAX_RATE}")
    if not found.num_samples:
        raise SampleError("the audio holds no samples")
    return found


class _SoundFileAudio(EncodedAudio):
    """WAV, FLAC, OGG and MP3."""

    def read(self, begin: int, end: int) -> Samples:
        import soundfile

        end = min(end, self.num_samples)
        try:
            with soundfile.SoundFile(BytesIO(self.content)) as file:
                # libsndfile reports lost bits on stderr when it jumps in an MP3, so that one is read from the start
                skipped = begin if file.format == "MP3" else file.seek(begin) * 0
                samples: Samples = file.read(end - begin + skipped, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SampleError(f"the audio cannot be decoded: {error.error_string}") from error
        if len(samples) < end - begin + skipped:
            raise SampleError(f"the audio is cut off: its header promises {self.seconds:.1f} s")
        return _mono(samples[skipped:].T)


def _open_soundfile(content: bytes, kind: str | None, limits: AudioLimits) -> EncodedAudio | None:
    """None for what libsndfile does not know, such as WAV files with MP3 inside."""
    require("soundfile", "audio", "decoding audio")
    import soundfile

    try:
        with soundfile.SoundFile(BytesIO(content)) as file:
            rate, channels, frames = int(file.samplerate), int(file.channels), int(file.frames)
    except soundfile.LibsndfileError:
        return None  # PyAV knows more kinds, and says what is wrong with what it does not
    limits.check(frames / rate, channels)
    return _SoundFileAudio(content, rate, channels, frames)


@dataclass(frozen=True)
class _ContainerAudio(EncodedAudio):
    """The first sound track of a container."""

    begin_s: float
    """When the track begins, on the clock of the container."""

    def read(self, begin: int, end: int) -> Samples:
        with open_container(self.content, "audio") as container:
            stream = container.streams.audio[0]
            begin_s = self.begin_s + begin / self.sample_rate
            if begin > _PREROLL_S * self.sample_rate:
                container.seek(int((begin_s - _PREROLL_S) * 1e6))
            samples = np.zeros(max(0, min(end, self.num_samples) - begin), np.float32)
            for place, part in _decoded(container, stream, self.begin_s, self.sample_rate, end):
                _overlay(samples, place - begin, _mono(part))
        return samples


def _overlay(samples: Samples, place: int, part: Samples) -> None:
    """Write a part where it belongs, as far as that lies within."""
    skipped = max(0, -place)
    room = samples[place + skipped : place + len(part)] if place + len(part) > 0 else samples[:0]
    room[:] = part[skipped : skipped + len(room)]


def _open_container(content: bytes, limits: AudioLimits) -> EncodedAudio:
    with open_container(content, "audio") as container:
        if not container.streams.audio:
            raise AbsentError("the file has no audio")
        stream = container.streams.audio[0]
        require_codec(stream, "audio")
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        if not rate or not channels:
            raise SampleError("the audio has no sample rate or no channels in its header")
        limits.check(header_seconds(container), channels)
        track = scan(container, stream, "audio", _MAX_PACKETS)
        limits.check(track.seconds, channels)
        begin = max(int(track.ticks[0]), stream.start_time or 0)  # packets before it prime the decoder
        seconds = float((track.end - begin) * track.time_base)
        return _ContainerAudio(content, rate, channels, round(seconds * rate), float(begin * track.time_base))


def _decoded(
    container: InputContainer, stream: AudioStream, begin_s: float, rate: int, end: int
) -> Iterator[tuple[int, Samples]]:
    """(number of its first sample, [channels, samples]) of each frame up to sample `end`.

    Frames follow each other without a gap, whatever rounding of the container's clock says, until the clock is far off.
    """
    place: int | None = None
    for frame in container.decode(stream):
        told = round((float(frame.time or 0.0) - begin_s) * rate)
        if place is None or abs(told - place) > _CLOCK_ROUNDING_S * rate:
            place = told
        samples = _planes(frame)
        yield place, samples
        place += samples.shape[1]
        if place >= end:
            return


def _planes(frame: AudioFrame) -> Samples:
    """The samples of a frame as float32 [channels, samples], full scale at 1."""
    try:
        values = frame.to_ndarray()
    except ValueError as error:  # samples of a type that NumPy is not given
        raise SampleError(f"the audio cannot be decoded: {error}") from error
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    bits = 8 * values.dtype.itemsize
    centre = 2 ** (bits - 1) if values.dtype.kind == "u" else 0
    scaled: Samples = ((values.astype(np.float64) - centre) / 2 ** (bits - 1)).astype(np.float32)
    return scaled


def _mono(samples: Samples) -> Samples:
    """The mean of the channels of [channels, samples]."""
    mean: Samples = samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
    return mean


def _resample(samples: Samples, up: int, down: int) -> Samples:
    """Polyphase filtering without delay: 80 dB of alias rejection, and a stretch comes out as it does of the whole."""
    from scipy.signal import resample_poly

    resampled: Samples = resample_poly(samples, up, down, window=_low_pass(up, down))
    return resampled


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> Samples:
    from scipy.signal import firwin

    steepest = max(up, down)
    taps = firwin(2 * _FILTER_REACH * steepest + 1, _ROLL_OFF / steepest, window=_FILTER_SHAPE)
    return np.asarray(taps, np.float32)
