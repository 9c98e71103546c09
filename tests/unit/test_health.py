"""Embedding health: exact values of small cases, and the figures of collapse and of an even sphere."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.health import effective_rank, logit_scales, modality_health, pair_health, uniformity
from mmpretrain.layers.scale import LogitScale

PAIR = ("image", "text")


def test_figures_of_a_small_case_are_those_of_their_formulas() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    figures = pair_health(u, v, PAIR)
    assert figures == pytest.approx({"alignment_image_text": 1.0, "modality_gap_image_text": math.hypot(0.5, 0.5)})
    figures = modality_health(u, "image")
    assert figures["uniformity_image"] == pytest.approx(-4.0)
    assert modality_health(v, "text")["uniformity_text"] == pytest.approx(0.0)
    assert figures["effective_rank_image"] == pytest.approx(1.0)
    assert figures["std_image"] == pytest.approx(0.5 * math.sqrt(2))


def test_uniformity_and_rank_equal_numpy() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((rows[i] - rows[j]) ** 2).sum()) for i in range(30) for j in range(i)]
    assert uniformity(torch.from_numpy(rows)).item() == pytest.approx(np.log(np.mean(pairs)))
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(torch.from_numpy(rows)).item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_a_collapsed_space_has_one_direction_and_no_spread() -> None:
    same = F.normalize(torch.ones(8, 4), dim=1)
    figures = modality_health(same, "image")
    assert figures["effective_rank_image"] == pytest.approx(1.0)
    assert figures["std_image"] == pytest.approx(0.0, abs=1e-6)
    assert figures["uniformity_image"] == pytest.approx(0.0, abs=1e-6)


def test_an_evenly_used_sphere_has_all_directions_and_unit_spread() -> None:
    rows = F.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    figures = modality_health(rows, "text")
    assert figures["effective_rank_text"] == pytest.approx(8.0, rel=0.01)
    assert figures["std_text"] == pytest.approx(1.0, rel=0.01)


def test_a_single_pair_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 samples that hold image and text; saw 1"):
        pair_health(torch.eye(1), torch.eye(1), PAIR)
    with pytest.raises(DataError, match="at least 2 samples that hold audio; saw 0"):
        modality_health(torch.zeros(0, 4), "audio")


def test_alignment_and_gap_of_any_pair_equal_numpy() -> None:
    draw = np.random.default_rng(1)
    u, v = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in draw.normal(size=(2, 40, 5)))
    figures = pair_health(torch.from_numpy(u), torch.from_numpy(v), ("audio", "video"))
    assert figures["alignment_audio_video"] == pytest.approx(np.mean(np.sum((u - v) ** 2, axis=1)))
    assert figures["modality_gap_audio_video"] == pytest.approx(np.linalg.norm(u.mean(axis=0) - v.mean(axis=0)))
    spread = modality_health(torch.from_numpy(u), "audio")["std_audio"]
    assert spread == pytest.approx(np.mean(np.std(u, axis=0)) * np.sqrt(5))


def test_every_temperature_of_a_model_is_named() -> None:
    several = nn.Module()
    several.scales = nn.ModuleDict({"image_audio": LogitScale(5.0, None), "image_text": LogitScale(200.0, 100.0)})
    itc = nn.Module()
    itc.logit_scale = LogitScale(14.0, 100.0)
    found = logit_scales(nn.ModuleDict({"itc": itc, "hub": several, "mlm": nn.Linear(1, 1)}))
    wanted = {"logit_scale_itc": 14.0, "logit_scale_hub_scales_image_audio": 5.0}
    assert found == pytest.approx(wanted | {"logit_scale_hub_scales_image_text": 100.0}, rel=1e-6)
