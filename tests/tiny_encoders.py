"""Tiny encoders of transformers with weights at which errors would show, saved as the library saves them.

Enter: a folder. Leave: one folder in it for each, with the files of its feature extractor or image processor.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    FeatureExtractionMixin,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

HALF = (0.5, 0.5, 0.5)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CLIPS = SIZES | {"num_frames": 4, "image_size": 16, "patch_size": 8}
WAVES = SIZES | {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 2,
    "mask_feature_prob": 0.3,
    "mask_feature_length": 4,
    "layerdrop": 0.5,
}
CLAP_TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 16}
CLAP_AUDIO = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "window_size": 4,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "drop_path_rate": 0.3,
}
MELS = {"feature_size": 16, "sampling_rate": 16_000, "hop_length": 160, "max_length_s": 1, "fft_window_size": 256}

EXTRACTORS: dict[str, FeatureExtractionMixin] = {
    "ast": ASTFeatureExtractor(num_mel_bins=32, max_length=64),
    "clap": ClapFeatureExtractor(**MELS, frequency_max=8000, truncation="rand_trunc"),
    "clap_fused": ClapFeatureExtractor(**MELS, frequency_max=7000, truncation="fusion"),
    "wav2vec2": Wav2Vec2FeatureExtractor(return_attention_mask=False),
    "wav2vec2_layer": Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "hubert": Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False),
}


def models() -> dict[str, PreTrainedModel]:
    fused = CLAP_AUDIO | {"enable_fusion": True}
    return {
        "dino": Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=14, num_register_tokens=2, drop_path_rate=0.3)
        ),
        "videomae": VideoMAEModel(VideoMAEConfig(**CLIPS, hidden_dropout_prob=0.2)),
        "vivit": VivitModel(VivitConfig(**CLIPS, tubelet_size=[2, 8, 8])),
        "timesformer": TimesformerModel(TimesformerConfig(**CLIPS, hidden_dropout_prob=0.2)),
        "ast": ASTModel(ASTConfig(**SIZES, num_mel_bins=32, max_length=64, frequency_stride=10, time_stride=10)),
        "clap": ClapModel(ClapConfig(text_config=CLAP_TEXT, audio_config=CLAP_AUDIO)),
        "clap_fused": ClapModel(ClapConfig(text_config=CLAP_TEXT, audio_config=fused)),
        "wav2vec2": Wav2Vec2Model(Wav2Vec2Config(**WAVES)),
        "wav2vec2_layer": Wav2Vec2Model(
            Wav2Vec2Config(**WAVES, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
        ),
        "hubert": HubertModel(HubertConfig(**WAVES, feat_extract_norm="layer")),
    }


def randomise(model: nn.Module) -> None:
    """Weights and statistics of a size at which errors show; transformers starts norms and biases at one and zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(-40, 5)
                module.running_var.uniform_(200, 400)


def save_encoders(root: Path) -> None:
    torch.manual_seed(0)
    for name, model in models().items():
        randomise(model)
        model.save_pretrained(root / name)
        if name in EXTRACTORS:
            EXTRACTORS[name].save_pretrained(root / name)
        else:
            statistics = {"image_mean": HALF, "image_std": HALF}
            (root / name / "preprocessor_config.json").write_text(json.dumps(statistics))
