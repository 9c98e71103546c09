"""Fusions: what may influence what, for joint and cross-attention fusion alike."""

import pytest
import torch
from pydantic import ValidationError

from mmpretrain.fusions.cross import CrossFusionConfig
from mmpretrain.fusions.joint import JointFusionConfig
from mmpretrain.fusions.late import LateFusionConfig

WIDTHS = {"image": 12, "text": 16}
FUSED = 16
KINDS = pytest.mark.parametrize("config", [JointFusionConfig, CrossFusionConfig])


def build(config):
    torch.manual_seed(0)
    return config(width=FUSED, depth=2, heads=2).build(WIDTHS)


def tokens(rows=2):
    torch.manual_seed(1)
    return {"image": torch.randn(rows, 4, 12), "text": torch.randn(rows, 3, 16)}


def mask(*lengths):
    return torch.arange(3) < torch.tensor(lengths)[:, None]


def test_late_fusion_builds_nothing():
    assert LateFusionConfig().build(WIDTHS) is None


@KINDS
def test_a_fusion_gives_back_each_modality_and_one_vector(config):
    fused = build(config)(tokens(), {"image": None, "text": mask(3, 2)})
    shapes = {name: tuple(tensor.shape) for name, tensor in fused.items()}
    assert shapes == {"image": (2, 4, FUSED), "text": (2, 3, FUSED), "pooled": (2, FUSED)}


@KINDS
def test_tokens_of_one_modality_see_the_other(config):
    fusion, inputs = build(config), tokens()
    before = fusion(inputs, {})["text"]
    inputs["image"] = inputs["image"] + 1 + torch.arange(12)
    assert (fusion(inputs, {})["text"] - before).abs().max() > 1e-3


@KINDS
def test_padding_reaches_neither_tokens_nor_the_pooled_vector(config):
    fusion, inputs, masks = build(config), tokens(), {"image": None, "text": mask(3, 1)}
    before = fusion(inputs, masks)
    inputs["text"] = torch.where(masks["text"][..., None], inputs["text"], 50.0)
    after = fusion(inputs, masks)
    for name in ("image", "pooled"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(after["text"][masks["text"]], before["text"][masks["text"]], atol=1e-6, rtol=0)


@KINDS
def test_an_absent_modality_has_no_influence_and_nothing_is_infinite(config):
    fusion, inputs = build(config), tokens()
    masks = {"image": torch.tensor([[True] * 4, [False] * 4]), "text": mask(3, 3)}
    before = fusion(inputs, masks)
    inputs["image"][1] = 9.0
    after = fusion(inputs, masks)
    torch.testing.assert_close(after["text"], before["text"], atol=1e-6, rtol=0)
    torch.testing.assert_close(after["pooled"], before["pooled"], atol=1e-6, rtol=0)


@KINDS
def test_a_row_without_any_token_is_finite_forward_and_backward(config):
    fusion = build(config)
    masks = {"image": torch.zeros(2, 4, dtype=torch.bool), "text": mask(0, 0)}
    fused = fusion(tokens(), masks)
    fused["pooled"].sum().backward()
    assert torch.isfinite(fused["pooled"]).all()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


@KINDS
def test_one_modality_alone_can_be_fused(config):
    fused = build(config)({"text": tokens()["text"]}, {"text": mask(3, 2)})
    assert set(fused) == {"text", "pooled"}


@KINDS
def test_a_full_mask_is_no_mask(config):
    fusion, inputs = build(config), tokens()
    full = {name: torch.ones(stream.shape[:2], dtype=torch.bool) for name, stream in inputs.items()}
    masked, plain = fusion(inputs, full), fusion(inputs, {})
    for name, stream in plain.items():
        torch.testing.assert_close(masked[name], stream, atol=1e-5, rtol=0)


def test_the_pooled_vector_of_cross_fusion_is_the_mean_over_the_modalities_a_row_has():
    masks = {"image": torch.tensor([[True] * 4, [False] * 4]), "text": mask(3, 2)}
    fused = build(CrossFusionConfig)(tokens(), masks)
    image, text = fused["image"], fused["text"]
    expected = torch.stack([(image[0].mean(0) + text[0].mean(0)) / 2, text[1, :2].mean(0)])
    torch.testing.assert_close(fused["pooled"], expected, atol=1e-6, rtol=0)


def test_a_tower_of_the_fusion_width_is_not_projected():
    fusion = build(JointFusionConfig)
    assert sum(p.numel() for p in fusion.adapters["text"].parameters()) == FUSED
    assert sum(p.numel() for p in fusion.adapters["image"].parameters()) == FUSED + 2 * 12 + 12 * FUSED + FUSED


@KINDS
def test_heads_that_do_not_divide_the_width_are_refused(config):
    with pytest.raises(ValidationError, match="width 16 is not a multiple of heads 3"):
        config(width=16, heads=3)
