"""What encoders of transformers are given of sound: waveforms or log-mel spectrograms, computed on the device.

Enter: int16 samples [B, N] and a mask with one entry per 10 ms. Leave: the keyword arguments of an encoder's forward,
equal to what the library's feature extractor makes of the same recordings (a recording reaches to the end of its last
10 ms). Refused: extractors other than those of AST, CLAP and Wav2Vec2. Legend: T frames, M mel bands, L tokens.
"""

import math
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    ClapFeatureExtractor,
    FeatureExtractionMixin,
    PretrainedConfig,
    Wav2Vec2FeatureExtractor,
)

from mmpretrain.core.config import Config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.layers.spectrogram import FULL_SCALE, LogMel, SpectrogramConfig
from mmpretrain.modalities.audio import MASK_RATE
from mmpretrain.models.hf_inputs import EncoderInputs

CountT = TypeVar("CountT", Tensor, int)
_DECIBELS = math.log(10) / 10
"""Natural logarithms in one decibel."""


class WaveformConfig(Config):
    """Samples between -1 and 1 (Wav2Vec2, HuBERT, WavLM)."""

    kind: Literal["waveform"] = "waveform"
    sample_rate: int = Field(16_000, gt=0, multiple_of=MASK_RATE)
    """Samples per second."""
    normalise: bool = True
    """Give each recording zero mean and unit variance."""
    attention_mask: bool = False
    """Hide padding from the encoder, and from normalisation; false for weights that were trained without."""


class LogMelConfig(Config):
    """A log-mel spectrogram (AST, CLAP)."""

    kind: Literal["log_mel"] = "log_mel"
    features: SpectrogramConfig
    """How sound becomes a spectrogram."""
    frames: int = Field(gt=0)
    """Frames of the spectrogram (T)."""
    mean: float = 0.0
    """Taken off the logarithms of energy."""
    std: float = Field(1.0, gt=0)
    """What they are then divided by."""
    channels: bool = False
    """The encoder wants [B, 1, T, M] in place of [B, T, M]."""
    zero_padding: bool = False
    """Frames behind the end of a recording are zero before normalisation (AST), not those of silence."""


SoundConfig = Annotated[WaveformConfig | LogMelConfig, Field(discriminator="kind")]


class WaveformInputs(EncoderInputs):
    """Samples, and which of them are padding."""

    def __init__(self, config: WaveformConfig, encoder: PretrainedConfig, num_samples: int) -> None:
        super().__init__()
        self.config, self.num_samples = config, num_samples
        self.convolutions = tuple(zip(encoder.conv_kernel, encoder.conv_stride, strict=True))

    def forward(self, inputs: Tensor, mask: Tensor | None) -> TensorDict:
        counts = self._counts(mask) if self.config.attention_mask and mask is not None else None
        waves = inputs.float() / FULL_SCALE
        if self.config.normalise:
            waves = _standardised(waves, counts)
        return {"input_values": waves} | ({} if counts is None else {"attention_mask": counts.long()})

    def example(self) -> TensorDict:
        return {"input_values": torch.zeros(1, self.num_samples, device="meta")}

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or not self.config.attention_mask:
            return None
        tokens = self.num_tokens(self._samples(mask).sum(dim=1))
        return torch.arange(self.num_tokens(self.num_samples), device=mask.device) < tokens[:, None]

    def num_tokens(self, samples: CountT) -> CountT:
        """Tokens that the convolutions make of so many samples."""
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1
        return samples

    def _counts(self, mask: Tensor) -> Tensor:
        """bool [B, N]; a row without any sound counts as whole, so that it stays finite."""
        counts = self._samples(mask)
        return counts | ~counts.any(dim=1, keepdim=True)

    def _samples(self, mask: Tensor) -> Tensor:
        return mask.repeat_interleave(self.config.sample_rate // MASK_RATE, dim=1)[:, : self.num_samples]


def _standardised(waves: Tensor, counts: Tensor | None) -> Tensor:
    """Zero mean and unit variance over the samples that count [B, N]; zero where none does."""
    weights = torch.ones_like(waves) if counts is None else counts.float()
    total = weights.sum(dim=1, keepdim=True)
    centred = (waves - (waves * weights).sum(dim=1, keepdim=True) / total) * weights
    variance = centred.square().sum(dim=1, keepdim=True) / total
    return centred / (variance + 1e-7).sqrt()


class LogMelInputs(EncoderInputs):
    """Normalised features per frame."""

    def __init__(self, name: str, config: LogMelConfig, encoder: PretrainedConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.log_mel = LogMel(config.features)
        self.grid = _spectrogram_grid(encoder, config)

    def forward(self, inputs: Tensor, mask: Tensor | None) -> TensorDict:
        features = self.log_mel(inputs)
        if self.config.zero_padding and mask is not None:
            features = features * self._sounding(mask, features.shape[1]).unsqueeze(-1)
        features = (features - self.config.mean) / self.config.std
        return {self.name: features.unsqueeze(1) if self.config.channels else features}

    def example(self) -> TensorDict:
        shape = (1, 1) if self.config.channels else (1,)
        return {self.name: torch.zeros(*shape, self.config.frames, self.config.features.num_mels, device="meta")}

    def content(self, found: int) -> int:
        return math.prod(self.grid) if self.grid else found

    def _sounding(self, mask: Tensor, frames: int) -> Tensor:
        """bool [B, T]: frames whose window lies within the recording."""
        features = self.config.features
        samples = mask.sum(dim=1, keepdim=True) * (features.sample_rate // MASK_RATE)
        ends = torch.arange(frames, device=mask.device) * features.hop_length + features.window_length
        return ends <= samples


def _spectrogram_grid(encoder: PretrainedConfig, config: LogMelConfig) -> tuple[int, ...]:
    """Patches, which may overlap, along bands and frames; empty for an encoder that merges them as it goes."""
    fields = encoder.to_dict()
    if not {"frequency_stride", "time_stride"} <= fields.keys():
        return ()
    size = fields["patch_size"]
    bands = (config.features.num_mels - size) // fields["frequency_stride"] + 1
    return bands, (config.frames - size) // fields["time_stride"] + 1


def build_sound(
    sound: WaveformConfig | LogMelConfig, name: str, encoder: PretrainedConfig, num_samples: int
) -> EncoderInputs:
    """The inputs of an encoder whose forward calls them `name`."""
    if isinstance(sound, LogMelConfig):
        return LogMelInputs(name, sound, encoder)
    return WaveformInputs(sound, encoder, num_samples)


def sound_field(sound: WaveformConfig | LogMelConfig, seconds: float | None) -> FieldSpec:
    """The samples an encoder reads; `seconds` is given for waveforms alone, whose length is free."""
    if isinstance(sound, WaveformConfig):
        return FieldSpec((round((seconds or 10.0) * sound.sample_rate),), "int16", sound.sample_rate)
    features = sound.features
    if seconds is not None:
        raise ConfigError(
            f"the audio tower reads {sound.frames} frames of {features.hop_length / features.sample_rate:g} s, which "
            "fixes the length of its recordings; remove seconds"
        )
    beyond = 0 if features.center else features.window_length
    return FieldSpec(((sound.frames - 1) * features.hop_length + beyond,), "int16", features.sample_rate)


def read_sound(name: str, encoder: PretrainedConfig, required: bool) -> WaveformConfig | LogMelConfig:
    """How the weights under a name want their sound, from preprocessor_config.json."""
    try:
        extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-untyped-call]
        return _sound_of(name, extractor)
    except (OSError, ValueError) as error:
        if required:
            raise ConfigError(
                f"{name} does not say how its sound is prepared (no usable preprocessor_config.json); set the tower's "
                f"sound ({error})"
            ) from error
    return _sound_of(name, _default_extractor(name, encoder))


def _default_extractor(name: str, encoder: PretrainedConfig) -> FeatureExtractionMixin:
    fields = encoder.to_dict()
    if "conv_kernel" in fields:
        masked = fields.get("feat_extract_norm") == "layer"
        return Wav2Vec2FeatureExtractor(return_attention_mask=masked)  # type: ignore[no-untyped-call]
    if "frequency_stride" in fields:
        sizes = {"num_mel_bins": encoder.num_mel_bins, "max_length": encoder.max_length}
        return ASTFeatureExtractor(**sizes)  # type: ignore[no-untyped-call]
    if "spec_size" in fields:
        return ClapFeatureExtractor(feature_size=encoder.num_mel_bins, truncation="rand_trunc")
    raise ConfigError(f"{name} reads sound in a way that is not known here; set the tower's sound")


def _sound_of(name: str, extractor: FeatureExtractionMixin) -> WaveformConfig | LogMelConfig:
    if isinstance(extractor, Wav2Vec2FeatureExtractor):
        return WaveformConfig(
            sample_rate=extractor.sampling_rate,
            normalise=extractor.do_normalize,
            attention_mask=extractor.return_attention_mask,
        )
    if isinstance(extractor, ASTFeatureExtractor):
        return _of_ast(extractor)
    if isinstance(extractor, ClapFeatureExtractor):
        return _of_clap(extractor)
    raise ConfigError(
        f"{name} prepares its sound by {type(extractor).__name__}; known are those of AST, CLAP and Wav2Vec2, or set "
        "the tower's sound"
    )


def _of_ast(extractor: ASTFeatureExtractor) -> LogMelConfig:
    rate = extractor.sampling_rate
    return LogMelConfig(
        features=SpectrogramConfig(sample_rate=rate, num_mels=extractor.num_mel_bins, max_frequency=rate // 2),
        frames=extractor.max_length,
        mean=extractor.mean if extractor.do_normalize else 0.0,
        std=2 * extractor.std if extractor.do_normalize else 1.0,
        zero_padding=True,
    )


def _of_clap(extractor: ClapFeatureExtractor) -> LogMelConfig:
    """Decibels; weights trained with feature fusion use other filters."""
    fused = extractor.truncation == "fusion"
    features = SpectrogramConfig(
        sample_rate=extractor.sampling_rate,
        num_mels=extractor.feature_size,
        window_length=extractor.fft_window_size,
        hop_length=extractor.hop_length,
        fft_length=extractor.fft_window_size,
        periodic_window=True,
        center=True,
        preemphasis=0.0,
        remove_dc_offset=False,
        min_frequency=extractor.frequency_min,
        max_frequency=extractor.frequency_max,
        mel_scale="htk" if fused else "slaney",
        mel_norm=None if fused else "slaney",
        mel_floor=1e-10,
    )
    frames = features.num_frames(extractor.nb_max_samples)
    return LogMelConfig(features=features, frames=frames, std=_DECIBELS, channels=True)
