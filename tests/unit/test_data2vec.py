"""Features of a moving average as targets: what the teacher says, its recurrence, and that it never trains."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_model import build_model, rows_of
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.models.finetune import FinetuneConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.trained_parts import prepare
from mmpretrain.objectives.base import ModelFacts, TowerFacts
from mmpretrain.objectives.data2vec import Data2VecConfig, FeatureModelling
from mmpretrain.training.fragments import move_average

CONFIG = Data2VecConfig(decoder_width=32, decoder_depth=1, decoder_heads=4, top_layers=2)
"""Of 16 patches 10 are hidden."""


def objective_of(model: MultimodalTransformer) -> FeatureModelling:
    found = model.objectives["features"]
    assert isinstance(found, FeatureModelling)
    return found


def build(config: Data2VecConfig = CONFIG) -> MultimodalTransformer:
    """A model whose teacher is its tower, as before a first step."""
    model = build_model({"features": config})
    follow(model, 0)
    return model


def follow(model: MultimodalTransformer, step: int) -> None:
    model.after_step(step, lambda average, network, keep: move_average(0, average, network, keep))


def targets_by_hooks(model: MultimodalTransformer, images: Tensor) -> np.ndarray:
    """Mean of the normalised outputs of both blocks of the tower, the class token left out, in NumPy."""
    tower, seen = model.towers["image"], []
    handles = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in tower.transformer.blocks]
    with torch.no_grad():
        tower(images)
    for handle in handles:
        handle.remove()
    layers = np.stack([output.numpy().astype(np.float64)[:, 1:] for output in seen])
    centred = layers - layers.mean(-1, keepdims=True)
    return (centred / np.sqrt(layers.var(-1, keepdims=True) + 1e-5)).mean(0)


@pytest.mark.parametrize("beta", [0.5, None])
def test_the_loss_is_the_distance_to_the_teachers_normalised_layers_at_hidden_patches(beta: float | None) -> None:
    model, rows = build(CONFIG.model_copy(update={"beta": beta})), rows_of([1, 1, 1])
    rows["image.present"][1] = False
    predictions: list[Tensor] = []
    objective_of(model).decoder.register_forward_hook(lambda _m, _i, output: predictions.append(output))
    parts = objective_of(model).encode(model.encoder(rows))
    hidden = objective_of(model).masking(rows["draw"]).hidden.numpy()
    targets = np.take_along_axis(targets_by_hooks(model, rows["image"]), hidden[:, :, None], axis=1)[[0, 2]]
    away = np.abs(predictions[0].detach().numpy()[[0, 2]] - targets)
    losses = away**2 if beta is None else np.where(away < beta, 0.5 * away**2 / beta, away - 0.5 * beta)
    assert objective_of(model).count(rows).item() == 2 * 10
    assert parts["sum"].item() == pytest.approx(losses.mean(-1).sum(), rel=1e-5)
    found = objective_of(model).metrics(parts)["target_std"].item()
    assert found == pytest.approx(targets.reshape(-1, targets.shape[-1]).std(0).mean(), rel=1e-4)
    assert found > 0.1


def test_the_teacher_follows_by_the_recurrence_of_the_paper() -> None:
    """tau runs straight from decay_start to decay_end, then stays; every weight is tau * own + (1 - tau) * tower's."""
    config = CONFIG.model_copy(update={"decay_start": 0.5, "decay_end": 0.9, "decay_steps": 4})
    model, generator = build(config), torch.Generator().manual_seed(0)
    tower, teacher = model.towers["image"], objective_of(model).teacher.network
    expected = {name: p.detach().numpy().astype(np.float64) for name, p in tower.named_parameters()}
    for step, tau in enumerate([0.6, 0.7, 0.8, 0.9, 0.9, 0.9], start=1):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        follow(model, step)
        for name, parameter in tower.named_parameters():
            expected[name] = tau * expected[name] + (1 - tau) * parameter.detach().numpy()
    for name, parameter in teacher.named_parameters():
        np.testing.assert_allclose(parameter.detach(), expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_before_the_first_step_the_teacher_is_the_tower() -> None:
    model = build()
    pairs = zip(objective_of(model).teacher.network.parameters(), model.towers["image"].parameters(), strict=True)
    assert all(torch.equal(mine, theirs) and mine is not theirs for mine, theirs in pairs)


def test_the_teacher_never_trains_and_never_drops_anything_out() -> None:
    model, rows = build(), rows_of([1, 1])
    model.train()
    model([rows], {"features": torch.tensor(0.05)})["loss"].backward()
    teacher = objective_of(model).teacher
    assert not any(module.training for module in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in objective_of(model).decoder.parameters())
    assert model.towers["image"].stem.project.weight.grad.abs().sum() > 0


def test_fine_tuning_the_whole_model_leaves_the_teacher_frozen() -> None:
    model = build()
    prepare(model, FinetuneConfig())
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if "teacher" not in name}


def test_hidden_patches_reach_the_prediction_only_through_the_teacher() -> None:
    model, rows = build(), rows_of([1])
    split = objective_of(model).masking(rows["draw"])
    predictions: list[Tensor] = []
    objective_of(model).decoder.register_forward_hook(lambda _m, _i, output: predictions.append(output))
    top, left = divmod(int(split.hidden[0, 0]), 4)
    changed = rows["image"].clone()
    changed[:, :, top * 4 : top * 4 + 4, left * 4 : left * 4 + 4] = 0
    sums = [
        objective_of(model).encode(model.encoder(rows | {"image": image}))["sum"] for image in (rows["image"], changed)
    ]
    assert torch.equal(predictions[0], predictions[1])
    assert abs(sums[0] - sums[1]).item() > 1e-3


def test_a_teacher_of_one_answer_is_told_by_the_spread_of_its_targets() -> None:
    model, rows = build(), rows_of([1, 1, 1])
    with torch.no_grad():
        for parameter in objective_of(model).teacher.network.stem.parameters():
            parameter.zero_()
    assert objective_of(model).metrics(objective_of(model).encode(model.encoder(rows)))["target_std"].item() < 0.1


def test_a_published_model_has_no_teacher_and_loads_without_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = build()
    model.save_pretrained(tmp_path, state_dict=model.published_state())
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {name for name in model.state_dict() if "teacher" not in name}
    loaded, report = MultimodalTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = rows_of([1])["image"]
    assert torch.equal(loaded.embed("image", images), model.eval().embed("image", images))


def test_a_network_of_other_parameters_is_not_followed() -> None:
    with pytest.raises(ConfigError, match=re.escape("only one of them has extra.bias")):
        move_average(0, nn.ModuleDict({"extra": nn.Linear(1, 1)}), nn.ModuleDict(), 0.5)


def test_more_layers_than_the_tower_tells_are_refused() -> None:
    tower = TowerFacts(8, 16, 0, patch_shape=(3, 4, 4), patch_grid=(4, 4), num_layers=1)
    with pytest.raises(ConfigError, match="top_layers 2 of a tower that tells 1 layers"):
        CONFIG.build(ModelFacts(8, {"image": tower}, None))


def test_a_tower_without_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="data2vec hides patches of a grid, but tower 'image' has none"):
        CONFIG.build(ModelFacts(8, {"image": TowerFacts(8, 16, 0)}, None))


def test_a_decay_that_falls_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"decay_end: 0\.9 is below decay_start 0\.999"):
        Data2VecConfig(decay_end=0.9)
