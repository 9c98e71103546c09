"""Sound in a worker: a recording, or the sound track of a video, becomes samples at the model's rate.

Enter: audio or video members. Leave: int16 [N], one channel, and a mask with one entry per 10 ms that is False where a
short recording was padded. Refused: members without sound, damaged, cut off, too long or of too many channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmpretrain.core.audio_bytes import AudioLimits, EncodedAudio, Samples, read_header
from mmpretrain.core.containers import require
from mmpretrain.core.errors import AbsentError, ConfigError, SampleError
from mmpretrain.core.media_types import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.modalities.base import CodecConfig

MASK_RATE = 100
"""Entries of the mask per second: the usual step of spectrograms, and a 160th of the samples' bytes and less."""

_EXTENSIONS = {
    "file": AUDIO_EXTENSIONS,
    "video": VIDEO_EXTENSIONS,
    "either": AUDIO_EXTENSIONS | VIDEO_EXTENSIONS,
}


class AudioCodecConfig(CodecConfig):
    """How recordings become samples; their rate and length come from the model's audio tower."""

    kind: Literal["audio"] = "audio"
    source: Literal["file", "video", "either"] = "either"
    """file: audio members; video: the sound track of video members; either: the file where a sample has one.
    A video without a sound track lacks audio, as `missing` says; one whose track is damaged is unusable."""
    segment: Literal["random", "first", "centre"] = "random"
    """Which stretch of a longer recording is used; random: any in training, the centre in evaluation."""
    short: Literal["pad", "repeat"] = "pad"
    """What follows a shorter recording: padding, which the mask tells, or the recording again."""
    max_seconds: float = Field(3600.0, gt=0)
    """Longer recordings are unusable, and nothing of them is decoded."""
    max_channels: int = Field(8, gt=0)
    """Recordings with more channels are unusable."""

    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "AudioCodec":
        require("scipy", "audio", "decoding audio")
        require("soundfile", "audio", "decoding audio")
        if self.source == "video":
            require("av", "video", "decoding the sound of videos")
        spec = inputs["audio"]
        if spec.rate is None or spec.rate % MASK_RATE:
            raise ConfigError(
                f"the audio tower wants {spec.rate} samples per second; the codec makes multiples of {MASK_RATE}"
            )
        return AudioCodec(spec.shape[0], spec.rate, self)


@dataclass(frozen=True)
class AudioCodec:
    """Decodes a stretch of one recording to int16 [length]; features are left to the device."""

    length: int
    sample_rate: int
    config: AudioCodecConfig

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        blocks = -(-self.length // (self.sample_rate // MASK_RATE))
        return {
            "audio": FieldSpec((self.length,), "int16", self.sample_rate),
            "audio.mask": FieldSpec((blocks,), "bool"),
        }

    @property
    def extensions(self) -> frozenset[str]:
        return _EXTENSIONS[self.config.source]

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        recording = self._recording(members)
        samples = recording.read_at(self.sample_rate, self._begin(recording, draw), self.length)
        if not len(samples):
            raise SampleError("the audio holds no samples")
        counts = np.arange(self.fields["audio.mask"].shape[0]) * (self.sample_rate // MASK_RATE) < len(samples)
        if self.config.short == "repeat":
            samples, counts = np.resize(samples, self.length), np.ones_like(counts)
        return {"audio": _sixteen_bits(np.pad(samples, (0, self.length - len(samples)))), "audio.mask": counts}

    def _recording(self, members: Mapping[str, bytes]) -> EncodedAudio:
        """A video may lack a sound track, as a sample may lack a member; an audio file without sound is broken."""
        extension = self._extension(members)
        limits = AudioLimits(self.config.max_seconds, self.config.max_channels)
        try:
            return read_header(members[extension], limits)
        except AbsentError as error:
            if extension in VIDEO_EXTENSIONS:
                raise
            raise SampleError(str(error)) from error

    def _extension(self, members: Mapping[str, bytes]) -> str:
        """An audio file before a video."""
        for wanted in (AUDIO_EXTENSIONS, VIDEO_EXTENSIONS):
            for extension in members:
                if extension in wanted & self.extensions:
                    return extension
        raise AbsentError(f"no audio member (saw: {', '.join(members)})")

    def _begin(self, recording: EncodedAudio, draw: np.random.Generator | None) -> int:
        """The first sample, at the model's rate."""
        spare = int(recording.seconds * self.sample_rate) - self.length
        if spare <= 0 or self.config.segment == "first":
            return 0
        if self.config.segment == "centre" or draw is None:
            return spare // 2
        return int(draw.integers(spare + 1))


def _sixteen_bits(samples: Samples) -> NDArray[np.int16]:
    scaled: Samples = np.rint(samples * 32768.0).clip(-32768, 32767)
    return scaled.astype(np.int16)
