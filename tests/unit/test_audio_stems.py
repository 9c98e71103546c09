"""Spectrogram and MFCC stems against transformers' spectrogram and SciPy's DCT."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.fft import dct
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mmpretrain.core.config import parse_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import row_key
from mmpretrain.core.types import FieldSpec
from mmpretrain.layers.spectrogram import LogMel, SpectrogramConfig
from mmpretrain.modalities.audio import AudioCodecConfig
from mmpretrain.modalities.audio_stems import MFCCStemConfig, SoundStem, SpectrogramStemConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.mae import MAEConfig

WHISPER = SpectrogramConfig(
    num_mels=80,
    fft_length=400,
    periodic_window=True,
    center=True,
    preemphasis=0.0,
    remove_dc_offset=False,
    min_frequency=0.0,
    mel_scale="slaney",
    mel_norm="slaney",
    mel_floor=1e-10,
)
SMALL = SpectrogramConfig(num_mels=32)


def waveform(num_samples: int = 16_000, rows: int = 2) -> torch.Tensor:
    """Tones that glide, in noise."""
    draw, times = np.random.default_rng(0), np.arange(num_samples) / 16_000
    sound = 0.3 * np.sin(2 * np.pi * (300 + 900 * times) * times) + draw.normal(0, 0.01, (rows, num_samples))
    return torch.from_numpy((sound * 32768).astype(np.int16))


def reference(samples: np.ndarray, config: SpectrogramConfig) -> np.ndarray:
    """[T, M], as the feature extractors of transformers compute it."""
    return spectrogram(
        samples / 32768,
        window_function(config.window_length, "hann", periodic=config.periodic_window),
        frame_length=config.window_length,
        hop_length=config.hop_length,
        fft_length=config.fft_length,
        power=2.0,
        center=config.center,
        preemphasis=config.preemphasis or None,
        mel_filters=mel_filter_bank(
            config.fft_length // 2 + 1,
            config.num_mels,
            config.min_frequency,
            8000.0,
            16_000,
            norm=config.mel_norm,
            mel_scale=config.mel_scale,
            triangularize_in_mel_space=config.mel_scale == "kaldi",
        ),
        log_mel="log",
        mel_floor=config.mel_floor,
        remove_dc_offset=config.remove_dc_offset,
    ).T


def mfcc(**options: object) -> MFCCStemConfig:
    return MFCCStemConfig.model_validate({"seconds": 1.0} | options)


@pytest.mark.parametrize("config", [SpectrogramConfig(), WHISPER], ids=["ast", "whisper"])
def test_the_spectrogram_is_that_of_transformers(config: SpectrogramConfig) -> None:
    samples = waveform()
    ours = LogMel(config)(samples)
    assert ours.shape == (2, config.num_frames(16_000), config.num_mels)
    for row in range(2):
        expected = reference(samples[row].numpy().astype(np.float64), config)
        np.testing.assert_allclose(ours[row].numpy(), expected, atol=1e-4)


def test_the_spectrogram_of_speech_is_that_of_transformers(shared_data: Path) -> None:
    content = sorted((shared_data / "flickr1k" / "speech").iterdir())[0].read_bytes()
    codec = AudioCodecConfig().build({"audio": FieldSpec((64_000,), "int16", 16_000)}, None)
    samples = codec.decode({"wav": content}, None)["audio"].astype(np.int16)
    ours = LogMel(SpectrogramConfig())(torch.from_numpy(samples)[None])[0].numpy()
    np.testing.assert_allclose(ours, reference(samples.astype(np.float64), SpectrogramConfig()), atol=1e-4)


def test_the_spectrogram_keeps_its_precision_under_autocast() -> None:
    samples, layer = waveform(), LogMel(SpectrogramConfig())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(samples), layer(samples).float())
        lowered = layer(samples)
    assert torch.equal(lowered, layer(samples))


def test_patches_cut_the_spectrogram_by_band_and_then_by_time() -> None:
    config = SpectrogramStemConfig(seconds=1.0, features=SMALL, patch_mels=16, patch_frames=8, mean=-3.0, std=4.0)
    stem, samples = config.build(24), waveform()
    log_mels = LogMel(SMALL)(samples).numpy()
    padded = np.zeros((2, 104, 32), np.float32)
    padded[:, :98] = log_mels
    normal = (padded + 3) / 4
    patches = stem.patchify(samples).numpy()
    assert stem.grid == (2, 13) and stem.num_tokens == 26 and stem.patch_shape == (1, 16, 8)
    for band, column in ((0, 0), (1, 4), (1, 12)):
        tile = normal[:, column * 8 : column * 8 + 8, band * 16 : band * 16 + 16].transpose(0, 2, 1)
        np.testing.assert_allclose(patches[:, band * 13 + column], tile.reshape(2, -1), atol=1e-5)
    assert stem(samples).shape == (2, 26, 24)


def test_cepstral_coefficients_are_scipys() -> None:
    config = mfcc(mean=0.0, std=1.0, num_coefficients=13, frames_per_token=2)
    stem, samples = config.build(16), waveform()
    log_mels = LogMel(config.features)(samples).numpy()
    expected = dct(log_mels, type=2, norm="ortho", axis=-1)[..., :13]
    patches = stem.patchify(samples).numpy().reshape(2, 49, 13, 2)
    assert stem.grid == (49,) and stem(samples).shape == (2, 49, 16)
    np.testing.assert_allclose(patches.transpose(0, 1, 3, 2).reshape(2, 98, 13), expected, atol=1e-4)


def test_tokens_count_as_far_as_the_recording_reaches() -> None:
    stem = SpectrogramStemConfig(seconds=1.0, features=SMALL, patch_frames=8).build(8)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[0, :17], mask[1] = True, True  # 0.17 s; a column of patches lasts 0.08 s
    counts = stem.token_mask(mask)
    assert counts.view(2, 2, 13)[0].tolist() == [[True] * 3 + [False] * 10] * 2
    assert counts[1].all()


def test_the_codec_makes_what_the_stem_wants() -> None:
    config = SpectrogramStemConfig(seconds=1.0, features=SMALL)
    codec = AudioCodecConfig().build({"audio": config.input_field}, None)
    assert codec.fields["audio"] == config.input_field == FieldSpec((16_000,), "int16", 16_000)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("stem", [{"kind": "spectrogram", "features": {"num_mels": 32}}, {"kind": "mfcc"}])
def test_a_tower_of_sound_embeds_padded_recordings_and_rebuilds_hidden_patches(
    stem: dict[str, object], positions: str
) -> None:
    tower = {
        "kind": "native",
        "width": 32,
        "depth": 1,
        "heads": 4,
        "stem": stem | {"seconds": 1.0, "positions": positions},
    }
    config = ModelConfig.model_validate({"embed_dim": 16, "towers": {"audio": tower}})
    objective = MAEConfig(modality="audio", mask_ratio=0.8, decoder_width=32, decoder_depth=1, decoder_heads=4)
    model = MultimodalTransformer.create(config, {"mam": objective})
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, 40:] = False
    rows = {"audio": waveform(), "audio.mask": mask, "audio.present": torch.ones(2, dtype=torch.bool)}
    rows["draw"] = torch.tensor([row_key(0, 0), row_key(0, 1)])
    outputs = model([rows], {"mam": torch.tensor(1.0) / model.counts([rows])["mam"]})
    outputs["loss"].backward()
    assert 0.5 < outputs["loss"].item() < 3
    assert all(parameter.grad is not None for parameter in model.objectives.parameters())
    embedded = model.embed("audio", rows["audio"], mask)
    silenced = copy.deepcopy(rows["audio"])
    silenced[1, 8000:] = 5  # behind what the mask counts, and behind the windows that reach over its end
    torch.testing.assert_close(model.embed("audio", silenced, mask), embedded)
    assert not torch.allclose(model.embed("audio", silenced, torch.ones_like(mask))[1], embedded[1])


def test_a_stem_rebuilt_in_a_fresh_process_needs_no_saved_tables() -> None:
    stem = mfcc().build(8)
    assert isinstance(stem, SoundStem) and set(stem.state_dict()) == {
        "project.weight",
        "project.bias",
        "positions.weight",
    }


def test_impossible_spectrograms_are_refused() -> None:
    with pytest.raises(ConfigError, match="patch_mels: 24 does not divide the 128 mel bands"):
        parse_config(SpectrogramStemConfig, "patch_mels: 24", "run.yaml")
    with pytest.raises(ConfigError, match="seconds: 0.01 is shorter than one window"):
        parse_config(SpectrogramStemConfig, "seconds: 0.01", "run.yaml")
    with pytest.raises(ConfigError, match="50 coefficients of 40 mel bands; use as many or fewer"):
        parse_config(MFCCStemConfig, "num_coefficients: 50", "run.yaml")
    with pytest.raises(ValidationError, match="window_length 600 is longer than fft_length 512; raise fft_length"):
        SpectrogramConfig(window_length=600)
