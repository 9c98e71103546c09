"""Exported pairs answer as the trained model does: in transformers and open_clip, each in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.siglip import SigLIPConfig
from mmpretrain.publishing.clip import clip_obstacles
from mmpretrain.publishing.dual_encoder import dual_encoder
from mmpretrain.publishing.exports import EXPORTS
from mmpretrain.publishing.folder import write_layouts
from mmpretrain.publishing.open_clip import open_clip_obstacles
from mmpretrain.publishing.siglip import siglip_obstacles, siglip_state

VOCABULARY = 60


def clip_model(activation: str = "gelu", **image: object) -> MultimodalTransformer:
    """A small ViT and text transformer in CLIP's layout."""
    common = {"kind": "native", "depth": 2, "heads": 2, "activation": activation}
    stem = {"kind": "patches", "image_size": 16, "patch_size": 8, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    words = {"kind": "embeddings", "context_length": 9, "vocab_size": VOCABULARY, "eos_id": VOCABULARY - 1}
    towers = {
        "image": {**common, "stem": stem, "width": 24, "pooling": "class", "pre_norm": True, **image},
        "text": {**common, "stem": words, "width": 16, "pooling": "eos", "causal": True, "mlp_ratio": 2.0},
    }
    return built({"embed_dim": 12, "towers": towers}, InfoNCEConfig())


def siglip_model() -> MultimodalTransformer:
    """A small ViT and text transformer in SigLIP's layout."""
    common = {"kind": "native", "depth": 2, "heads": 2, "activation": "gelu_tanh", "norm_eps": 1e-6}
    half = [0.5, 0.5, 0.5]
    stem = {"kind": "patches", "image_size": 16, "patch_size": 8, "bias": True, "mean": half, "std": half}
    words = {"kind": "embeddings", "context_length": 9, "vocab_size": VOCABULARY, "eos_id": VOCABULARY - 1}
    towers = {
        "image": {**common, "stem": stem, "width": 24, "pooling": "map", "projection": False},
        "text": {**common, "stem": words, "width": 16, "pooling": "last", "attend_padding": True},
    }
    towers["text"]["projection_bias"] = True
    return built({"embed_dim": 24, "towers": towers}, SigLIPConfig())


def resnet_model() -> MultimodalTransformer:
    """A CNN and a text transformer, which no other library's layout holds."""
    words = {"kind": "embeddings", "context_length": 9, "vocab_size": VOCABULARY}
    towers = {
        "image": {"kind": "torchvision", "name": "resnet18", "image_size": 32},
        "text": {"kind": "native", "stem": words, "width": 16, "depth": 1, "heads": 2},
    }
    return built({"embed_dim": 12, "towers": towers}, InfoNCEConfig())


def built(config: dict[str, object], objective: InfoNCEConfig | SigLIPConfig) -> MultimodalTransformer:
    """The model with every weight, norms and biases too, away from its initial value."""
    torch.manual_seed(0)
    model = MultimodalTransformer.create(ModelConfig.model_validate(config), {"itc": objective})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def verified(*folders: Path) -> subprocess.CompletedProcess[str]:
    """All folders checked by one fresh process."""
    command = [sys.executable, "-m", "mmpretrain.publishing.verify", *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_exported_pairs_answer_alike_in_transformers_and_open_clip(tmp_path: Path) -> None:
    models = {
        "gelu": clip_model(),
        "quick_gelu": clip_model("quick_gelu"),
        "tanh": clip_model("gelu_tanh"),
        "plain": clip_model(pre_norm=False, norm_eps=1e-6),
        "siglip": siglip_model(),
        "resnet": resnet_model(),
    }
    layouts = {}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        layouts[name] = [layout for layout, met in write_layouts(model, tmp_path / name, None).items() if not met]
    assert layouts == {
        "gelu": ["clip", "open_clip"],
        "quick_gelu": ["clip", "open_clip"],
        "tanh": ["clip", "open_clip"],
        "plain": ["open_clip"],
        "siglip": ["siglip"],
        "resnet": [],
    }
    outcome = verified(*(tmp_path / name for name in models))
    assert outcome.returncode == 0, outcome.stderr
    for name, line in zip(models, outcome.stdout.splitlines(), strict=True):
        results = json.loads(line)
        assert list(results) == ["mmpretrain", *layouts[name]]
        assert all(set(found) == {"image", "text"} for found in results.values())
        assert max(value for found in results.values() for value in found.values()) < 1e-5


def test_a_copy_with_a_changed_weight_is_refused(tmp_path: Path) -> None:
    write_layouts(clip_model(), tmp_path, None)
    path = tmp_path / "clip" / "model.safetensors"
    weights = load_file(path)
    weights["visual_projection.weight"][0, 0] += 0.01
    save_file(weights, path, metadata={"format": "pt"})
    outcome = verified(tmp_path)
    assert outcome.returncode == 1
    assert "clip: embeddings differ from the trained model's by {'image':" in outcome.stderr


def test_scale_and_bias_of_the_loss_are_exported() -> None:
    model = siglip_model()
    state = siglip_state(dual_encoder(model))
    objective = model.objectives["itc"]
    assert state["logit_scale"].exp().item() == pytest.approx(objective.logit_scale().item())
    assert state["logit_bias"].item() == objective.logit_bias().item()


def test_obstacles_name_each_option_that_does_not_fit() -> None:
    config = clip_model(pooling="mean", pre_norm=False).config.parsed_model()
    assert clip_obstacles(config) == [
        "towers.image.pooling is 'mean', the layout needs 'class'",
        "towers.image.pre_norm is False, the layout needs True",
    ]
    assert open_clip_obstacles(config) == ["towers.image.pooling is 'mean', the layout needs 'class'"]
    assert "towers.text.pooling is 'eos', the layout needs 'last'" in siglip_obstacles(config)


def test_open_clip_needs_the_end_token_last() -> None:
    config = clip_model().config.parsed_model()
    fields = config.model_dump()
    fields["towers"]["text"]["stem"]["eos_id"] = 7
    assert "the end token has id 7 of 60" in open_clip_obstacles(ModelConfig.model_validate(fields))[0]
    fields["towers"]["text"]["stem"]["eos_id"] = 2
    assert "the end token has id 2" in clip_obstacles(ModelConfig.model_validate(fields))[0]


def test_a_tower_of_another_kind_has_no_layout_but_our_own() -> None:
    obstacles = clip_obstacles(resnet_model().config.parsed_model())
    assert obstacles == ["the image tower is of kind torchvision; the layout needs a native one"]


def test_a_model_without_an_image_tower_has_no_pair() -> None:
    fields = clip_model().config.parsed_model().model_dump()
    del fields["towers"]["image"]
    expected = ["the model has towers ['text']; the layout needs image and text"]
    assert clip_obstacles(ModelConfig.model_validate(fields)) == expected


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        ("clip-vit-b32", {"clip", "open_clip"}),
        ("clip-vit-b16", {"clip", "open_clip"}),
        ("clip-vit-l14", {"clip", "open_clip"}),
        ("siglip-vit-b16", {"siglip"}),
    ],
)
def test_the_published_architectures_have_their_layouts(config: str, layouts: set[str]) -> None:
    run = load_run_config(configs_folder() / f"{config}.yaml")
    assert {export.name for export in EXPORTS if not export.obstacles(run.model)} == layouts
