"""Fusions: what may influence what, alike for all of them, and their formulas."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import softmax

from mmpretrain.core.errors import ConfigError
from mmpretrain.fusions.cross import CrossFusionConfig
from mmpretrain.fusions.early import EarlyFusionConfig
from mmpretrain.fusions.gated import GatedFusionConfig
from mmpretrain.fusions.hierarchical import HierarchicalFusionConfig
from mmpretrain.fusions.joint import JointFusionConfig
from mmpretrain.fusions.late import LateFusionConfig
from mmpretrain.layers import products

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


THREE = {"audio": 16, "image": 12, "text": 16}
LENGTHS = {"audio": 5, "image": 4, "text": 3}
UNREAD = ("markers", "layers.0.audio", "layers.1.audio")
"""Of a modality at which, by choice, nobody looks, or that looks at nothing."""
ALL_KINDS = pytest.mark.parametrize(
    "config",
    [
        JointFusionConfig(width=FUSED, depth=2, heads=2),
        CrossFusionConfig(width=FUSED, depth=2, heads=2),
        CrossFusionConfig(width=FUSED, depth=2, heads=2, attend={"text": ("image", "audio"), "image": ("text",)}),
        EarlyFusionConfig(width=FUSED, depth=2, heads=2),
        EarlyFusionConfig(width=FUSED, depth=2, heads=2, experts=True),
        GatedFusionConfig(width=FUSED, depth=2, heads=2),
        GatedFusionConfig(width=FUSED, depth=2, heads=2, attend={"text": ("image",)}),
        HierarchicalFusionConfig(width=FUSED, depth=2, heads=2, latents=3),
        HierarchicalFusionConfig(width=FUSED, depth=2, heads=2, latents=3, bottlenecks=2, reading_depth=2),
        LateFusionConfig(pooled="mean", width=FUSED),
        LateFusionConfig(pooled="concat", width=FUSED),
        LateFusionConfig(pooled="gated", width=FUSED),
    ],
    ids=repr,
)


def three(config):
    """A fusion in float64 with open gates, and outputs and masks of five rows that lack different modalities."""
    torch.manual_seed(2)
    fusion = config.build(THREE).double()
    for name, parameter in fusion.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(parameter, 0.7)
    pooled = config.build(THREE).reads == "pooled"
    lengths = dict.fromkeys(THREE, 1) if pooled else LENGTHS
    inputs = {m: torch.randn(5, lengths[m], width, dtype=torch.float64) for m, width in THREE.items()}
    present = {
        "audio": torch.tensor([True, False, True, False, False]),
        "image": torch.tensor([True, True, False, False, True]),
        "text": torch.tensor([True, True, True, True, False]),
    }
    masks = {m: present[m][:, None].expand(5, lengths[m]).clone() for m in THREE}
    if not pooled:
        masks["text"][1, 2:] = False
    return fusion, inputs, masks


@ALL_KINDS
def test_every_row_is_fused_as_if_alone_with_the_modalities_it_has(config):
    fusion, inputs, masks = three(config)
    whole = fusion(inputs, masks)
    for row in range(5):
        own = {m: inputs[m][row : row + 1, masks[m][row]] for m in THREE if masks[m][row].any()}
        alone = fusion(own, {})
        torch.testing.assert_close(whole["pooled"][row], alone["pooled"][0], atol=1e-12, rtol=0)
        if config.gives_tokens:
            for m in own:
                torch.testing.assert_close(whole[m][row, masks[m][row]], alone[m][0], atol=1e-12, rtol=0)


@ALL_KINDS
def test_what_stands_in_absent_modalities_gets_no_gradient(config):
    fusion, inputs, masks = three(config)
    inputs = {m: tensor.requires_grad_() for m, tensor in inputs.items()}
    fusion(inputs, masks)["pooled"].square().sum().backward()
    for m, tensor in inputs.items():
        assert torch.isfinite(tensor.grad).all()
        assert not tensor.grad[~masks[m]].any()
        assert tensor.grad[masks[m]].any()


@ALL_KINDS
def test_a_row_without_any_modality_stays_finite_forward_and_backward(config):
    fusion, inputs, masks = three(config)
    fused = fusion(inputs, {m: torch.zeros_like(mask) for m, mask in masks.items()})
    fused["pooled"].sum().backward()
    assert torch.isfinite(fused["pooled"]).all()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


@pytest.mark.parametrize("has_instructions", [False, True])
@ALL_KINDS
def test_rows_that_lack_modalities_stay_finite_in_bf16_on_any_cpu(config, has_instructions, monkeypatch):
    monkeypatch.setattr(products, "has_bf16_products", lambda: has_instructions)
    fusion, inputs, masks = three(config)
    fusion, inputs = fusion.float(), {m: tensor.float() for m, tensor in inputs.items()}
    masks["image"][3] = masks["text"][3] = False  # now the fourth row has nothing at all
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(inputs, masks)
    fused["pooled"].float().square().sum().backward()
    assert torch.isfinite(fused["pooled"]).all()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


@ALL_KINDS
def test_every_parameter_learns_when_all_modalities_are_there(config):
    fusion, inputs, _ = three(config)
    fused = fusion(inputs, {})
    sum(stream.square().sum() for stream in fused.values()).backward()
    still = {name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()}
    chosen = "attend" in config.model_fields_set
    assert all("absent" in name or (chosen and name.startswith(UNREAD)) for name in still), still


def test_closed_gates_let_tokens_leave_as_they_came():
    fusion = GatedFusionConfig(width=16, depth=3, heads=2).build({"audio": 16, "text": 16})
    inputs = {"audio": torch.randn(2, 5, 16), "text": torch.randn(2, 3, 16)}
    fused = fusion(inputs, {"text": mask(3, 1)})
    assert torch.equal(fused["audio"], inputs["audio"])
    assert torch.equal(fused["text"], inputs["text"])


def test_chosen_pairs_decide_who_sees_whom():
    for kind in (CrossFusionConfig, GatedFusionConfig):
        fusion, inputs, _ = three(kind(width=FUSED, depth=1, heads=2, attend={"text": ("image",)}))
        before = fusion(inputs, {})
        after = fusion(inputs | {"image": torch.randn_like(inputs["image"])}, {})
        assert (after["text"] - before["text"]).abs().max() > 1e-3
        assert torch.equal(after["audio"], before["audio"])


@pytest.mark.parametrize(
    ("attend", "message"),
    [({"text": ("smell",)}, "no tower: smell"), ({"text": ("text",)}, "remove a modality from its own list")],
)
def test_attending_to_strangers_or_oneself_is_refused(attend, message):
    with pytest.raises(ConfigError, match=message):
        GatedFusionConfig(width=16, heads=2, attend=attend).build(THREE)


def test_the_formula_of_a_gated_layer_is_softmax_of_scaled_products():
    """One head of NumPy: softmax(Q_A K_B^T / sqrt(d)) V_B over [null, B], behind tanh(gate)."""
    fusion, inputs, _ = three(GatedFusionConfig(width=16, depth=1, heads=1, attend={"text": ("audio",)}))
    block, gate = fusion.layers[0]["text"], math.tanh(0.7)
    torch.nn.init.zeros_(block.mlp_gate.weight)
    null = fusion.null.weight.expand(5, 1, -1)
    context = block.norm_context(torch.cat([null, inputs["audio"] + fusion.markers["audio"].weight], 1))
    attention = block.cross_attention
    query = attention.query(block.norm_cross(inputs["text"])).detach().numpy()
    key, value = np.split(attention.key_value(context).detach().numpy(), 2, axis=-1)
    seen = softmax(query @ key.transpose(0, 2, 1) / 4, axis=-1) @ value
    out = seen @ attention.out_proj.weight.detach().numpy().T + attention.out_proj.bias.detach().numpy()
    np.testing.assert_allclose(
        fusion(inputs, {})["text"].detach().numpy(), inputs["text"].numpy() + gate * out, atol=1e-12
    )


def test_the_formula_of_a_cross_layer_is_softmax_of_scaled_products_of_each_pair():
    """Two heads of NumPy: softmax(Q_A K_B^T / sqrt(d)) V_B over [null, B], for A each modality and B all others."""
    fusion, inputs, masks = three(CrossFusionConfig(width=16, depth=1, heads=2))
    streams, null = {m: fusion.adapters[m](inputs[m]) for m in THREE}, fusion.null(5)
    fused = fusion(inputs, masks)
    for m in THREE:
        block, others = fusion.layers[0].blocks[m], [other for other in THREE if other != m]
        tokens = streams[m] + block.attention(block.norm1(streams[m]), masks[m])
        context = block.norm_context(torch.cat([null, *(streams[other] for other in others)], 1))
        counts = torch.cat([torch.ones(5, 1, dtype=torch.bool), *(masks[other] for other in others)], 1).numpy()
        attention = block.cross_attention
        query = attention.query(block.norm_cross(tokens)).detach().numpy()
        key, value = np.split(attention.key_value(context).detach().numpy(), 2, axis=-1)
        seen = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = query[..., head] @ key[..., head].transpose(0, 2, 1) / math.sqrt(8)
            seen.append(softmax(np.where(counts[:, None], scores, -np.inf), axis=-1) @ value[..., head])
        weight, bias = attention.out_proj.weight.detach().numpy(), attention.out_proj.bias.detach().numpy()
        moved = tokens.detach() + torch.from_numpy(np.concatenate(seen, -1) @ weight.T + bias)
        expected = fusion.norms[m](moved + block.mlp(block.norm2(moved)))
        here = masks[m]
        torch.testing.assert_close(fused[m][here], expected[here], atol=1e-12, rtol=0)


def test_each_modality_is_fed_by_its_own_expert_and_attends_to_all():
    fusion, inputs, _ = three(EarlyFusionConfig(width=FUSED, depth=1, heads=2, experts=True))
    block, lengths = fusion.blocks[0], {"shared": 1} | {m: inputs[m].shape[1] for m in THREE}
    tokens = torch.cat([fusion.class_token(5), *(fusion.adapters[m](inputs[m]) for m in THREE)], 1)
    tokens = tokens + block.attention(block.norm1(tokens))
    parts = block.norm2(tokens).split(list(lengths.values()), 1)
    fed = torch.cat([block.experts[name](part) for name, part in zip(lengths, parts, strict=True)], 1)
    expected = fusion.norm(tokens + fed)
    fused = fusion(inputs, {})
    found = torch.cat([fused["pooled"][:, None], *(fused[m] for m in THREE)], 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_mean_of_late_fusion_is_over_the_modalities_a_row_has():
    fusion, inputs, masks = three(LateFusionConfig(pooled="mean", width=FUSED))
    found = fusion(inputs, masks)["pooled"]
    for row in range(5):
        vectors = [fusion.adapters[m](inputs[m])[row, 0] for m in THREE if masks[m][row].any()]
        torch.testing.assert_close(found[row], torch.stack(vectors).mean(0), atol=1e-12, rtol=0)


def test_concatenation_puts_a_learned_vector_where_a_modality_is_absent():
    fusion, inputs, masks = three(LateFusionConfig(pooled="concat", width=FUSED))
    found = fusion(inputs, masks)["pooled"]
    for row in range(5):
        parts = [
            fusion.adapters[m](inputs[m])[row, 0] if masks[m][row].any() else fusion.absent[m].weight for m in THREE
        ]
        mixed = fusion.mix(fusion.norm(torch.cat(parts)))
        torch.testing.assert_close(found[row], mixed + fusion.mlp(mixed), atol=1e-12, rtol=0)


def test_gated_late_fusion_weighs_by_the_softmax_of_scores():
    fusion, inputs, masks = three(LateFusionConfig(pooled="gated", width=FUSED))
    found = fusion(inputs, masks)["pooled"].detach().numpy()
    for row in range(5):
        names = [m for m in THREE if masks[m][row].any()]
        vectors = np.stack([fusion.adapters[m](inputs[m])[row, 0].detach().numpy() for m in names])
        scores = [fusion.scores[m](torch.tensor(v)).item() for m, v in zip(names, vectors, strict=True)]
        np.testing.assert_allclose(found[row], softmax(scores) @ vectors, atol=1e-6)


def test_bottlenecks_alone_carry_what_modalities_tell_each_other():
    """With one layer the streams end before they could read the bottlenecks again, so nothing crosses."""
    for bottlenecks, crosses in ((0, True), (2, False)):
        fusion, inputs, _ = three(
            HierarchicalFusionConfig(width=16, depth=1, heads=2, latents=3, bottlenecks=bottlenecks)
        )
        streams = {m: fusion.readers[m](inputs[m], None) for m in THREE}
        present = torch.ones(5, 3, dtype=torch.bool)
        shared = fusion.bottlenecks(5) if bottlenecks else torch.zeros(5, 0, 16, dtype=torch.float64)
        before, _ = fusion.layers[0](streams, shared, present)
        after, told = fusion.layers[0](streams | {"text": streams["text"] + torch.randn(16).double()}, shared, present)
        assert torch.equal(before["image"], after["image"]) is not crosses
        assert told.shape == (5, bottlenecks, 16)
