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
