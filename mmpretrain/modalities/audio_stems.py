"""Sound on the device: patches of a log-mel spectrogram, or frames of cepstral coefficients, become tokens.

Enter: int16 samples [B, N] at the stem's rate, and a mask with one entry per 10 ms. Leave: tokens [B, L, D], and for
masked autoencoding the patches themselves. Refused: recordings shorter than a window, mels that patches do not divide.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.config import Rule
from mmpretrain.core.types import FieldSpec
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.parameters import LearnedPositions
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.layers.spectrogram import Cepstrum, LogMel, SpectrogramConfig
from mmpretrain.modalities.audio import MASK_RATE
from mmpretrain.modalities.base import PatchStem, StemConfig


class _SoundStemConfig(StemConfig):
    """What all stems over spectrograms share."""

    seconds: float = Field(10.24, gt=0)
    """Length of the recordings; longer ones are cut, shorter ones padded."""
    features: SpectrogramConfig = SpectrogramConfig()
    """How sound becomes a spectrogram."""
    positions: Literal["learned", "sincos"] = "learned"
    """learned: one vector per patch; sincos: fixed, by frequency and time."""
    mean: float = -4.2677393
    """Mean of the logarithms of energy (AST's, of AudioSet)."""
    std: float = Field(9.1379948, gt=0)
    """What they are divided by (AST's: twice the standard deviation in AudioSet)."""

    def broken_rules(self) -> Iterable[Rule]:
        if self.num_samples < self.features.window_length:
            yield ("seconds",), f"{self.seconds} is shorter than one window of the spectrogram; raise it"

    @property
    def num_samples(self) -> int:
        return round(self.seconds * self.features.sample_rate)

    @property
    def num_frames(self) -> int:
        return self.features.num_frames(self.num_samples)

    @property
    def modality(self) -> str:
        return "audio"

    @property
    def input_field(self) -> FieldSpec:
        return FieldSpec((self.num_samples,), "int16", self.features.sample_rate)


class SpectrogramStemConfig(_SoundStemConfig):
    """Patches of a log-mel spectrogram, as in AST; they do not overlap, so that they can be hidden and rebuilt."""

    kind: Literal["spectrogram"] = "spectrogram"
    patch_mels: int = Field(16, gt=0)
    """Height of a patch in mel bands."""
    patch_frames: int = Field(16, gt=0)
    """Width of a patch in frames; the last ones are padded with zeros, as AST does."""

    def broken_rules(self) -> Iterable[Rule]:
        yield from super().broken_rules()
        if self.features.num_mels % self.patch_mels:
            yield ("patch_mels",), f"{self.patch_mels} does not divide the {self.features.num_mels} mel bands"

    def build(self, width: int) -> "SoundStem":
        grid = (self.features.num_mels // self.patch_mels, math.ceil(self.num_frames / self.patch_frames))
        return SoundStem(self, nn.Identity(), grid, (1, self.patch_mels, self.patch_frames), width)


class MFCCStemConfig(_SoundStemConfig):
    """Mel-frequency cepstral coefficients, some neighbouring frames to a token."""

    kind: Literal["mfcc"] = "mfcc"
    features: SpectrogramConfig = SpectrogramConfig(num_mels=40)
    """How sound becomes the spectrogram of which the coefficients are taken."""
    num_coefficients: int = Field(20, gt=0)
    """Coefficients per frame, from the mean of the bands (the 0th) on."""
    frames_per_token: int = Field(2, gt=0)
    """Neighbouring frames that make one token."""

    def broken_rules(self) -> Iterable[Rule]:
        yield from super().broken_rules()
        if self.num_coefficients > self.features.num_mels:
            yield (
                ("num_coefficients",),
                f"{self.num_coefficients} coefficients of {self.features.num_mels} mel bands; use as many or fewer",
            )

    def build(self, width: int) -> "SoundStem":
        cepstrum = Cepstrum(self.features.num_mels, self.num_coefficients)
        grid = (math.ceil(self.num_frames / self.frames_per_token),)
        return SoundStem(self, cepstrum, grid, (1, self.num_coefficients, self.frames_per_token), width)


class SoundStem(PatchStem):
    """Normalised features per frame, cut into patches of bands and frames, each projected to the tower's width."""

    def __init__(
        self,
        config: SpectrogramStemConfig | MFCCStemConfig,
        transform: nn.Module,
        grid: tuple[int, ...],
        patch_shape: tuple[int, int, int],
        width: int,
    ) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.grid, self.patch_shape, self.num_tokens = grid, patch_shape, math.prod(grid)
        self.samples_per_column = patch_shape[2] * config.features.hop_length
        self.samples_per_block = config.features.sample_rate // MASK_RATE
        self.log_mel, self.transform = LogMel(config.features), transform
        fan_in = math.prod(patch_shape)
        self.project = Linear(fan_in, width, std=(3 * fan_in) ** -0.5)
        self.positions: nn.Module = (
            LearnedPositions(self.num_tokens, width, std=width**-0.5)
            if config.positions == "learned"
            else SinCosPositions(grid, width)
        )

    def patchify(self, inputs: Tensor) -> Tensor:
        _, bands, frames = self.patch_shape
        log_mels = self.log_mel(inputs)
        short = self.grid[-1] * frames - log_mels.shape[1]
        features = self.transform((F.pad(log_mels, (0, 0, 0, short)) - self.mean) / self.std)
        tiles = features.unflatten(2, (-1, bands)).unflatten(1, (-1, frames))  # rows, column, frame, line, band
        patches: Tensor = tiles.permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)
        return patches

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.positions(self.project(self.patchify(inputs)))
        return tokens

    def token_mask(self, mask: Tensor) -> Tensor:
        """A token counts where its patch begins before the recording ends."""
        begins = torch.arange(self.grid[-1], device=mask.device) * self.samples_per_column // self.samples_per_block
        columns = mask[:, begins.clamp(max=mask.shape[1] - 1)]
        return columns.repeat(1, self.num_tokens // self.grid[-1])
