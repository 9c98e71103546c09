"""Entries of several pairs: each pair an objective of its own, counted by itself, its figures under its own name."""

import re

import pytest
import torch
from pydantic import ValidationError
from tiny_model import build_model, rows_of

from mmpretrain.core.errors import ConfigError
from mmpretrain.objectives.base import expand_all
from mmpretrain.objectives.infonce import InfoNCE, InfoNCEConfig
from mmpretrain.objectives.siglip import SigLIPConfig

FOUR = ("video", "image", "text", "audio")


def test_a_hub_meets_each_other_modality_of_the_model_with_the_settings_of_the_entry() -> None:
    entry = SigLIPConfig(hub="image", weight=0.5, bias_init=-3.0)
    found = expand_all({"itc": entry}, FOUR)
    assert list(found) == ["itc_image_audio", "itc_image_text", "itc_image_video"]
    for other, objective in zip(("audio", "text", "video"), found.values(), strict=True):
        assert objective == SigLIPConfig(pair=("image", other), weight=0.5, bias_init=-3.0)


def test_pairs_stand_for_themselves_and_one_pair_keeps_the_name_of_its_entry() -> None:
    entries = {"itc": InfoNCEConfig(), "more": InfoNCEConfig(pairs=(("text", "audio"), ("image", "video")))}
    found = expand_all(entries, FOUR)
    assert {name: objective.modalities for name, objective in found.items()} == {
        "itc": ("image", "text"),
        "more_text_audio": ("text", "audio"),
        "more_image_video": ("image", "video"),
    }
    assert entries["more"].modalities == ("text", "audio", "image", "video")


def test_a_model_holds_one_objective_for_each_pair() -> None:
    model, rows = build_model({"itc": InfoNCEConfig(pairs=(("image", "text"),))}), rows_of([3, 4, 5])
    assert isinstance(model.objectives["itc_image_text"], InfoNCE)
    rows["text.present"][1] = False
    assert {name: count.item() for name, count in model.counts([rows]).items()} == {"itc_image_text": 2.0}


def test_figures_that_several_objectives_give_carry_their_names() -> None:
    model, rows = build_model({"itc": InfoNCEConfig(), "other": SigLIPConfig()}), rows_of([3, 4, 5])
    output = model([rows], {"itc": torch.tensor(1.0), "other": torch.tensor(1.0)})
    assert output["metric.logit_scale_itc"].item() == pytest.approx(1 / 0.07)
    assert output["metric.logit_scale_other"].item() == pytest.approx(10.0)
    assert "metric.logit_bias" in output and "metric.logit_scale" not in output
    torch.testing.assert_close(output["loss"], output["sum.itc"] + output["sum.other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pair": ("image", "text"), "hub": "image"}, "pair and hub both name the modalities that meet"),
        ({"pairs": (("image", "text"),), "hub": "image"}, "pairs and hub both name the modalities that meet"),
        ({"pairs": (("image", "text"), ("text", "image"))}, "pairs names ['image', 'text'] twice"),
        ({"pairs": (("image", "image"),)}, "name two different ones"),
    ],
)
def test_pairs_named_twice_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        InfoNCEConfig.model_validate(settings)


def test_two_objectives_of_one_name_are_refused() -> None:
    entries = {"itc": InfoNCEConfig(hub="image"), "itc_image_text": InfoNCEConfig()}
    with pytest.raises(ConfigError, match="two objectives would be called itc_image_text; rename one"):
        expand_all(entries, ("image", "text"))


def test_a_hub_without_another_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="the hub image of objective itc meets no other modality"):
        expand_all({"itc": InfoNCEConfig(hub="image")}, ("image",))
