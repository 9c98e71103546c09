"""Whole models on the meta device against the published parameter counts."""

from pathlib import Path

import pytest
import torch

from mmpretrain.config import load_run_config
from mmpretrain.core.config import Config, parse_config
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class ModelFile(Config):
    """A preset: the model section alone."""

    model: ModelConfig


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("clip-vit-b32", 151_277_313),
        ("clip-vit-b16", 149_620_737),
        ("clip-vit-l14", 427_616_513),
        ("siglip-vit-b16", 203_155_970),
    ],
)
def test_a_published_architecture_has_the_published_number_of_parameters(name, published):
    run = load_run_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        assert count(MultimodalTransformer.create(run.model, run.objectives)) == published


@pytest.mark.parametrize(
    ("name", "image", "text", "fusion"),
    [("base", 85.8, 63.2, 44.5), ("large", 303, 123, 79), ("huge", 631, 353, 242)],
)
def test_a_preset_has_the_millions_of_parameters_it_is_planned_with(name, image, text, fusion):
    preset = parse_config(ModelFile, (CONFIGS / "model" / f"{name}.yaml").read_text(), f"{name}.yaml").model
    words = TokenizerFacts(vocab_size=49408, pad_id=0, eos_id=49407)
    with torch.device("meta"):
        model = MultimodalTransformer.create(resolve(preset, words), {})
    assert count(model.towers["image"]) / 1e6 == pytest.approx(image, rel=0.005)
    assert count(model.towers["text"]) / 1e6 == pytest.approx(text, rel=0.005)
    # The plan's fusion has a third modality to project.
    assert count(model.fusion) / 1e6 == pytest.approx(fusion, rel=0.04)


BASE = {"image": 85.8, "audio": 85.6, "video": 86.4}
"""Millions: ViT-B/16, AST-base without its distillation token, VideoMAE-base's encoder."""
WORDS = {name: size * 512 / 1e6 for name, size in {"clip": 49408, "bert": 30522}.items()}
TEXT = {name: 63.2 - WORDS["clip"] + words for name, words in WORDS.items()}


@pytest.mark.parametrize(
    ("name", "vocabulary", "towers", "fusion"),
    [
        ("trimodal-base", 30522, {"image": BASE["image"], "audio": BASE["audio"], "text": TEXT["bert"]}, 42.9),
        ("fourmodal-base", 30522, BASE | {"text": TEXT["bert"]}, 42.9),
        ("video-text-base", 49408, {"video": BASE["video"], "text": TEXT["clip"]}, None),
        ("clap-base", 50265, {"audio": BASE["audio"], "text": 124.6 - 0.6}, None),  # RoBERTa-base without its pooler
    ],
)
def test_a_run_of_several_modalities_has_towers_of_base_size(name, vocabulary, towers, fusion):
    run = load_run_config(CONFIGS / f"{name}.yaml")
    words = TokenizerFacts(vocab_size=vocabulary, pad_id=0, eos_id=2, mask_id=3)
    with torch.device("meta"):
        model = MultimodalTransformer.create(resolve(run.model, words), run.objectives)
    assert {modality: count(tower) / 1e6 for modality, tower in model.towers.items()} == pytest.approx(
        towers, rel=0.006
    )
    if fusion is not None:
        assert count(model.fusion) / 1e6 == pytest.approx(fusion, rel=0.005)


def test_coca_has_the_decoder_of_its_paper():
    """Table 1 of arXiv 2205.01917: 297 million in the decoder, of 64,000 words whose output matrix is its own."""
    run = load_run_config(CONFIGS / "coca-base.yaml")
    with torch.device("meta"):
        model = MultimodalTransformer.create(run.model, run.objectives)
    decoder = count(model.towers["text"]) + count(model.objectives["caption"])
    assert (decoder + (64_000 - 49_408 + 64_000) * 768) / 1e6 == pytest.approx(297, rel=0.005)
