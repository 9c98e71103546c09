"""Patches left out and smaller images at first: by the row's key and the step alone, never in evaluation."""

import numpy as np
import pytest
import torch
from plain_towers import image_embeddings
from pydantic import ValidationError
from tiny_model import MODEL, PATCH_SIZE, rows_of
from torch import Tensor
from torch.nn import functional

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import row_key
from mmpretrain.layers.patch_dropout import DropPhase, PatchDropout
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig

DRAW = torch.tensor([row_key(0, position) for position in range(500)])
HALF_THEN_ALL = [{"from_step": 0, "share": 0.5}, {"from_step": 3, "share": 0.0}]
SMALL_THEN_ALL = [{"from_step": 0, "image_size": 8}, {"from_step": 3, "image_size": 16}]


def model_with(stem: dict[str, object] | None = None, **image: object) -> MultimodalTransformer:
    """The tiny model with other settings of its image tower, and always the same weights."""
    tower = MODEL["towers"]["image"]
    towers = MODEL["towers"] | {"image": tower | image | {"stem": tower["stem"] | (stem or {})}}
    torch.manual_seed(7)
    config = ModelConfig.model_validate(MODEL | {"towers": towers})
    return MultimodalTransformer.create(resolve(config, None), {"itc": InfoNCEConfig()})


def embedded(model: MultimodalTransformer, rows: dict[str, Tensor]) -> Tensor:
    return model.encoder(rows).embed("image")


def test_each_row_keeps_as_many_patches_chosen_by_its_key_alone() -> None:
    dropout = PatchDropout(0.75, "test")
    kept = dropout(DRAW, 49)
    assert kept is not None and kept.shape == (500, 12)
    assert all(len(set(row)) == 12 and row == sorted(row) for row in kept.tolist())
    assert torch.equal(dropout(DRAW[40:45], 49), kept[40:45])
    often = np.bincount(kept.flatten().numpy(), minlength=49) / 500
    np.testing.assert_allclose(often, 12 / 49, atol=0.08)
    assert dropout(DRAW[:1], 1).tolist() == [[0]], "one patch always stays"


def test_padding_is_left_out_before_what_counts() -> None:
    counts = torch.arange(8) < torch.tensor([3, 4, 8])[:, None]
    kept = PatchDropout(0.5, "test")(DRAW[:3], 8, counts)
    assert {0, 1, 2} < set(kept[0].tolist()) and kept[1].tolist() == [0, 1, 2, 3]
    assert kept[2].tolist() == PatchDropout(0.5, "test")(DRAW[2:3], 8)[0].tolist()


def test_a_training_tower_sees_the_kept_patches_and_an_evaluated_one_all() -> None:
    model, rows = model_with(patch_dropout=0.5).double(), rows_of([3, 4, 5, 6])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert model.encoder(rows).tower("image")["tokens"].shape[1] == 1 + 8
    for training, drop in ((True, 0.5), (False, 0.0)):
        expected = plainly(weights, rows, drop)
        found = embedded(model.train(training), rows)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, check_dtype=False)
    batch = {"image": rows["image"]}
    assert embedded(model.train(False), batch).shape == (4, 32), "evaluation needs no keys"


def plainly(weights: dict[str, Tensor], rows: dict[str, Tensor], drop: float) -> Tensor:
    return image_embeddings(weights, rows, PATCH_SIZE, heads=4, drop=drop, pre_norm=False)


def test_chunks_of_a_batch_keep_the_same_patches() -> None:
    model, rows = model_with(patch_dropout=0.5), rows_of([3, 4, 5, 6])
    halves = [{name: value[part] for name, value in rows.items()} for part in (slice(0, 2), slice(2, 4))]
    found = torch.cat([embedded(model, half) for half in halves])
    torch.testing.assert_close(found, embedded(model, rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"patch_dropout": HALF_THEN_ALL}, {"stem": {"phases": SMALL_THEN_ALL}}])
def test_the_last_phase_sees_all_and_costs_what_the_plain_tower_costs(change: dict[str, object]) -> None:
    model, plain, rows = model_with(**change), model_with(), rows_of([3, 4])
    tokens = {}
    for step in (0, 2, 3, 9):
        model.begin_step(step)
        tokens[step] = model.encoder(rows).tower("image")["tokens"].shape[1] - 1
    assert tokens in ({0: 8, 2: 8, 3: 16, 9: 16}, {0: 4, 2: 4, 3: 16, 9: 16})
    assert torch.equal(embedded(model, rows), embedded(plain, rows))
    model.begin_step(0)
    assert torch.equal(embedded(model.train(False), rows), embedded(plain, rows))


def test_smaller_images_are_seen_from_resampled_positions() -> None:
    model, rows = model_with({"phases": SMALL_THEN_ALL}), rows_of([3, 4])
    stem = model.towers["image"].stem
    settings = {"mode": "bicubic", "antialias": True}
    small = functional.interpolate(rows["image"].float(), size=(8, 8), **settings).clamp(0, 255)
    table = stem.positions.weight.T.reshape(1, 32, 4, 4)
    positions = functional.interpolate(table, size=(2, 2), **settings).flatten(2)[0].T
    expected = stem.project(stem.patchify(small)) + positions
    found = stem(rows["image"])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert stem.positions.weight.grad.abs().sum() > 0


def test_smaller_images_combine_with_dropped_patches_and_fixed_positions() -> None:
    stem = {"phases": SMALL_THEN_ALL, "positions": "sincos"}
    model = model_with(stem, patch_dropout=[DropPhase(from_step=0, share=0.5)])
    assert model.encoder(rows_of([3])).tower("image")["tokens"].shape == (1, 1 + 2, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_dropout": 1.0}, "less than 1"),
        ({"patch_dropout": [{"from_step": 5, "share": 0.5}]}, "begins with from_step 5, so nothing is said"),
        ({"patch_dropout": [HALF_THEN_ALL[0], HALF_THEN_ALL[0]]}, "from_step 0 does not come after 0"),
        ({"stem": {"phases": SMALL_THEN_ALL[:1]}}, "the last phase has images of 8 pixels.*end with a phase of 16"),
        ({"stem": {"phases": [{"from_step": 0, "image_size": 10}, SMALL_THEN_ALL[1]]}}, "10 is no multiple.*use 8"),
        ({"stem": {"phases": [{"from_step": 0, "image_size": 32}, SMALL_THEN_ALL[1]]}}, "32 is no multiple.*use 16"),
    ],
)
def test_phases_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model_with(**change)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.towers.text.patch_dropout=0.5"], "patch_dropout leaves out patches and a text has none"),
        (["model.towers.image.patch_dropout=[{from_step: 0, share: 0.5}, {from_step: 600, share: 0}]", "steps=600"],
         "its last phase begins at from_step 600, which a run of 600 steps does not reach"),
        (["model.towers.image.stem.phases=[{from_step: 0, image_size: 12}, {from_step: 9, image_size: 24}]"],
         r"hides patches of one grid, and that of model\.towers\.image changes"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_the_run_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(configs_folder() / "demo.yaml", overrides)


def test_a_tower_of_frames_refuses_dropped_patches() -> None:
    image = MODEL["towers"]["image"] | {"patch_dropout": 0.5}
    video = {"kind": "frames", "image": image, "frames": 2, "heads": 4}
    with pytest.raises(ValidationError, match="patch_dropout of the image tower inside a tower of kind frames"):
        ModelConfig.model_validate({"towers": {"video": video}})
