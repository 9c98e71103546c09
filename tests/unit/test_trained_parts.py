"""Which weights of a model learn, and at which share of the rate; adapters, and what they are when merged."""

import pytest
import torch
from pydantic import ValidationError
from tiny_model import build_model, rows_of

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.finetune import FinetuneConfig
from mmpretrain.models.lora import merge_adapters
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.frames import FramesTowerConfig
from mmpretrain.models.towers.torchvision import TorchvisionTowerConfig
from mmpretrain.models.trained_parts import depths, learning_rate_shares, prepare
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.training.optimizer import parameter_groups

BLOCK_0, BLOCK_1 = "transformer.blocks.0.", "transformer.blocks.1."


def prepared(**fields: object) -> MultimodalTransformer:
    """A pair of towers of two blocks each, a fusion and a contrastive head, with what learns decided."""
    model = build_model({"itc": InfoNCEConfig()})
    prepare(model, FinetuneConfig.model_validate(fields))
    return model


def learning(model: MultimodalTransformer, prefix: str) -> set[str]:
    return {
        name.removeprefix(prefix) for name, p in model.named_parameters() if p.requires_grad and name.startswith(prefix)
    }


def test_by_default_everything_learns() -> None:
    assert all(parameter.requires_grad for parameter in prepared().parameters())


def test_the_last_blocks_learn_with_what_follows_them_and_all_heads() -> None:
    model = prepared(train=1)
    image = learning(model, "towers.image.")
    assert image and all(name.startswith((BLOCK_1, "norm.")) for name in image)
    assert {f"{BLOCK_1}mlp.fc2.bias", "norm.weight"} <= image
    assert learning(model, "projections.") == {"image.weight", "text.weight"}
    assert learning(model, "fusion.") and learning(model, "objectives.") == {"itc.logit_scale.log"}


def test_heads_learn_alone_and_a_frozen_tower_has_no_projection_that_learns() -> None:
    heads = prepared(train="heads")
    assert not learning(heads, "towers.") and learning(heads, "projections.") == {"image.weight", "text.weight"}
    locked = prepared(towers={"image": "frozen"})
    assert not learning(locked, "towers.image.") and learning(locked, "projections.") == {"text.weight"}
    assert len(learning(locked, "towers.text.")) == len(list(locked.towers["text"].parameters()))


def test_a_frozen_tower_builds_no_graph() -> None:
    batch = rows_of([5, 9])
    locked = prepared(towers={"image": "heads"}).train()
    outputs = locked.encoder(batch).tower("image")
    assert not outputs["tokens"].requires_grad and not outputs["pooled"].requires_grad
    assert locked.encoder(batch).embed("image").requires_grad and locked.encoder(batch).embed("text").requires_grad


def test_the_rate_falls_block_by_block_towards_the_stem() -> None:
    model = prepared(layer_decay=0.5)
    shares = learning_rate_shares(model, FinetuneConfig(layer_decay=0.5))
    for tower in ("towers.image.", "towers.text."):
        for name in (name.removeprefix(tower) for name, _ in model.named_parameters() if name.startswith(tower)):
            # BEiT's rule in other words: heads and final norm 1, last block 1/2, the one before 1/4, the stem 1/8
            expected = 0.5 if name.startswith(BLOCK_1) else 0.25 if name.startswith(BLOCK_0) else 0.125
            assert shares.get(tower + name, 1.0) == (1.0 if name.startswith("norm.") else expected), name
    assert not any(name.startswith(("projections.", "fusion.", "objectives.")) for name in shares)
    groups = parameter_groups(model, 0.1, shares)
    assert sorted({group["lr_share"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_blocks_are_found_in_every_kind_of_tower() -> None:
    image = {"kind": "native", "stem": {"kind": "patches", "image_size": 8, "patch_size": 4}, "width": 16, "depth": 2}
    frames = FramesTowerConfig.model_validate({"image": image | {"heads": 2}, "frames": 2, "depth": 3, "heads": 2})
    found = depths(frames.build("video"))
    assert found["image.stem.project.weight"] == 0 and found["image.transformer.blocks.1.norm1.weight"] == 2
    assert found["image.norm.weight"] == found["positions.weight"] == 3 and found["norm.bias"] == 6
    resnet = depths(TorchvisionTowerConfig(name="resnet18", image_size=32).build("image"))
    assert resnet["trunk.conv1.weight"] == 0 and resnet["trunk.layer4.1.conv2.weight"] == 4


@pytest.mark.parametrize("targets", [None, ["attention", "mlp.fc1"]])
def test_adapters_begin_without_effect_and_merge_into_what_they_computed(targets: list[str] | None) -> None:
    batch = rows_of([4, 9])
    plain = build_model({"itc": InfoNCEConfig()}).encoder(batch).embed("image")
    model = prepared(lora={"rank": 3, "alpha": 6, "targets": targets, "towers": ["image"]})
    adapters = learning(model, "towers.image.")
    per_block = 4 if targets is None else 3
    assert len(adapters) == 2 * 2 * per_block and all("lora_" in name for name in adapters)
    assert not any("lora_" in name for name in learning(model, "towers.text."))
    assert torch.equal(model.encoder(batch).embed("image"), plain)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = model.encoder(batch).embed("image").detach()
    assert (adapted - plain).abs().max() > 0.01
    merge_adapters(model)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in build_model({"itc": InfoNCEConfig()}).named_parameters()
    }
    torch.testing.assert_close(model.encoder(batch).embed("image"), adapted, atol=1e-5, rtol=0)


def test_a_merged_weight_is_the_formula_of_the_paper() -> None:
    model = prepared(lora={"rank": 2, "alpha": 8, "targets": ["mlp.fc2"], "towers": ["image"]})
    layer = model.get_submodule("towers.image.transformer.blocks.0.mlp.fc2")
    low, high, base = (layer.get_parameter(n) for n in ("lora_A.default.weight", "lora_B.default.weight", "weight"))
    with torch.no_grad():
        high.normal_()
    expected = base.double() + 8 / 2 * high.double() @ low.double()
    merge_adapters(model)
    merged = model.get_parameter("towers.image.transformer.blocks.0.mlp.fc2.weight")
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": 3}, "last 3 blocks of the tower image are to learn and it has 2; name at most 2"),
        ({"towers": {"text": 5}}, "last 5 blocks of the tower text .* e.g. finetune.towers.text=2"),
        ({"lora": {"targets": ["q_proj"]}}, "'q_proj' matches no linear layer of the tower image; .*attention.*fc1"),
        ({"lora": {"targets": ["attention", "fc"]}}, "'fc' matches no linear layer"),
    ],
)
def test_what_is_not_in_the_model_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(**fields)


def test_nothing_left_to_learn_is_refused() -> None:
    towers = {"image": {"kind": "native", "stem": {"kind": "patches", "image_size": 8, "patch_size": 4}}}
    config = {"embed_dim": 16, "towers": {"image": towers["image"] | {"width": 16, "depth": 1, "heads": 2}}}
    model = MultimodalTransformer.create(ModelConfig.model_validate(config), {})
    with pytest.raises(ConfigError, match="nothing is left to learn; all towers are frozen"):
        prepare(model, FinetuneConfig(train="frozen"))


def test_contradictions_are_refused_where_the_config_is_read() -> None:
    with pytest.raises(ValidationError, match="image: the tower has LoRA adapters"):
        FinetuneConfig.model_validate({"towers": {"image": 1}, "lora": {}})
    with pytest.raises(ValidationError, match="saw 2, but every tower has LoRA adapters"):
        FinetuneConfig.model_validate({"train": 2, "lora": {}})
    demo = configs_folder() / "demo.yaml"
    for override in ("finetune.towers.speech=frozen", "finetune.lora.towers=[speech]"):
        with pytest.raises(ConfigError, match=r"names the tower speech, the model has image"):
            load_run_config(demo, (override,))
    with pytest.raises(ConfigError, match="finetune.train"):
        load_run_config(demo, ("finetune.train=0",))


def test_adapters_without_their_library_are_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmpretrain.core.containers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"finetune.lora needs peft, .* pip install 'mmpretrain\[lora\]'"):
        prepared(lora={})
