"""Waveforms into log-mel spectrograms and cepstral coefficients, on the device.

Enter: int16 samples. Leave: fp32 features per frame, equal to those of `transformers.audio_utils.spectrogram` and of
SciPy's DCT. Refused: windows longer than the transform. Shape legend: B rows, N samples, T frames, W window, M mels.
"""

import math
import warnings
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.config import Config

FULL_SCALE = 32768.0
"""Of int16 samples; features see a waveform between -1 and 1."""


class SpectrogramConfig(Config):
    """How a waveform becomes a log-mel spectrogram; the defaults are those of AST (Gong et al., arXiv 2104.01778)."""

    sample_rate: int = Field(16_000, gt=0, multiple_of=100)
    """Samples per second, to which recordings are converted."""
    num_mels: int = Field(128, gt=0)
    """Mel bands."""
    window_length: int = Field(400, gt=1)
    """Samples per frame."""
    hop_length: int = Field(160, gt=0)
    """Samples from one frame to the next."""
    fft_length: int = Field(512, gt=1)
    """Length of the Fourier transform; frames are padded with zeros to it."""
    periodic_window: bool = False
    """A Hann window of period W (Whisper, CLAP) in place of W - 1 (Kaldi, AST)."""
    center: bool = False
    """Frames lie around their time, the ends mirrored; else the first frame begins with the first sample."""
    preemphasis: float = Field(0.97, ge=0, lt=1)
    """Share of the sample before that is taken off each; 0: none."""
    remove_dc_offset: bool = True
    """Take the mean off each frame."""
    min_frequency: float = Field(20.0, ge=0)
    """Lower end of the lowest band in Hz."""
    max_frequency: float | None = Field(None, gt=0)
    """Upper end of the highest band in Hz; null: half the sample rate."""
    mel_scale: Literal["kaldi", "htk", "slaney"] = "kaldi"
    """Which formula turns Hz into mel; kaldi also spaces the triangles in mel."""
    mel_norm: Literal["slaney"] | None = None
    """slaney: each band has the same area; null: the same height."""
    mel_floor: float = Field(1.192092955078125e-07, gt=0)
    """Least energy of a band, before the natural logarithm."""

    @model_validator(mode="after")
    def _window_fits(self) -> "SpectrogramConfig":
        if self.window_length > self.fft_length:
            raise ValueError(
                f"window_length {self.window_length} is longer than fft_length {self.fft_length}; raise fft_length"
            )
        return self

    def num_frames(self, num_samples: int) -> int:
        """Frames of a waveform."""
        if self.center:
            return 1 + num_samples // self.hop_length
        return 1 + (num_samples - self.window_length) // self.hop_length


class LogMel(nn.Module):
    """The natural logarithm of the energy in each mel band; nothing is learned or saved."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: SpectrogramConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.empty(config.window_length, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", torch.empty(config.fft_length // 2 + 1, config.num_mels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        from transformers.audio_utils import mel_filter_bank  # loads much; only models with such a stem need it

        config = self.config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty bands: AST's own filters, the defaults here, have one
            filters = mel_filter_bank(
                num_frequency_bins=self.filters.shape[0],
                num_mel_filters=config.num_mels,
                min_frequency=config.min_frequency,
                max_frequency=config.max_frequency or config.sample_rate / 2,
                sampling_rate=config.sample_rate,
                norm=config.mel_norm,
                mel_scale=config.mel_scale,
                triangularize_in_mel_space=config.mel_scale == "kaldi",
            )
        hann = torch.hann_window(config.window_length, periodic=config.periodic_window, dtype=torch.float64)
        self.window.copy_(hann)
        self.filters.copy_(torch.from_numpy(filters))

    def forward(self, samples: Tensor) -> Tensor:
        """Map int16 samples [B, N] to fp32 [B, T, M]."""
        with torch.autocast(samples.device.type, enabled=False):  # energies span more than bf16 can tell apart
            # in fp32, rounding of the loud bands would be seen in those 60 dB below them
            frames = self._frames(samples.double() / FULL_SCALE)
            spectrum = torch.fft.rfft(frames * self.window, self.config.fft_length)
            energy = spectrum.abs().square().float()
            log_mels: Tensor = (energy @ self.filters).clamp(min=self.config.mel_floor).log()
            return log_mels

    def _frames(self, waveform: Tensor) -> Tensor:
        """Cut [B, N] into overlapping frames [B, T, W], without offset and with emphasis on high frequencies."""
        config = self.config
        if config.center:
            margin = config.window_length // 2
            waveform = F.pad(waveform[:, None], (margin, margin), mode="reflect")[:, 0]
        frames = waveform.unfold(1, config.window_length, config.hop_length)
        if config.remove_dc_offset:
            frames = frames - frames.mean(dim=2, keepdim=True)
        if config.preemphasis:
            frames = frames - config.preemphasis * torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        return frames


class Cepstrum(nn.Module):
    """The first coefficients of the orthonormal DCT-II over the mel bands: MFCCs."""

    basis: Tensor

    def __init__(self, num_mels: int, num_coefficients: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.empty(num_mels, num_coefficients), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bands, waves = self.basis.shape
        places = (torch.arange(bands, dtype=torch.float64) + 0.5) * math.pi / bands
        basis = (places[:, None] * torch.arange(waves, dtype=torch.float64)).cos() * math.sqrt(2 / bands)
        basis[:, 0] /= math.sqrt(2)
        self.basis.copy_(basis)

    def forward(self, log_mels: Tensor) -> Tensor:
        """Map [B, T, M] to [B, T, coefficients]."""
        with torch.autocast(log_mels.device.type, enabled=False):
            return log_mels @ self.basis
