"""Matching: negatives by their similarity and never of the same sample, a loss of three pairs for each row."""

import math

import numpy as np
import pytest
import torch
from tiny_model import build_model, rows_of
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import row_key
from mmpretrain.layers.hard_negatives import Rows, draw_negatives
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.itm import ITMConfig, Matching

LENGTHS = [3, 9, 5, 14, 7, 2]


def known(rows: int, first_position: int = 0) -> Rows:
    draw = torch.tensor([row_key(0, first_position + row) for row in range(rows)])
    return Rows(torch.ones(rows, dtype=torch.bool), torch.arange(rows), draw)


def objective_of(model: MultimodalTransformer) -> Matching:
    found = model.objectives["itm"]
    assert isinstance(found, Matching)
    return found


def loss_of(model: MultimodalTransformer, rows: dict[str, Tensor], chunks: int = 1) -> dict[str, Tensor]:
    cut = zip(*(tensor.chunk(chunks) for tensor in rows.values()), strict=True)
    micro = [dict(zip(rows, values, strict=True)) for values in cut]
    return model(micro, {"itm": 1 / model.counts(micro)["itm"]})


def test_negatives_are_drawn_in_proportion_to_exp_of_their_logits() -> None:
    """Six kinds of rows, each 250 times. Chi-square of four degrees of freedom passes 18.5 once in a thousand."""
    generator, times = np.random.default_rng(0), 250
    rows, columns = generator.normal(size=(2, 6, 3))
    same = np.array([0, 1, 1, 3, 4, 5])
    facts = known(6 * times)._replace(sample=torch.tensor(same).repeat(times))
    numbers, found = draw_negatives(
        torch.tensor(rows).repeat(times, 1), torch.tensor(columns).repeat(times, 1), facts, "test", edge=400
    )
    assert found.all()
    drawn = np.zeros((6, 6))
    np.add.at(drawn, (np.arange(6 * times) % 6, numbers.numpy() % 6), 1)
    odds = np.exp(rows @ columns.T) * (same[:, None] != same[None, :])
    expected = times * odds / odds.sum(1, keepdims=True)
    assert not drawn[expected == 0].any()
    squares = np.divide((drawn - expected) ** 2, expected, out=np.zeros_like(drawn), where=expected > 0).sum(1)
    assert (squares < 18.5).all(), squares


def test_a_draw_is_the_same_in_tiles_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn((2, 30, 8), generator=generator)
    whole = draw_negatives(rows, columns, known(30), "test")
    for edge in (4, 7, 30):
        assert torch.equal(draw_negatives(rows, columns, known(30), "test", edge).numbers, whole.numbers)
    assert len(set(whole.numbers.tolist())) > 10


def test_absent_rows_neither_ask_nor_are_drawn_and_no_sample_is_its_own_negative() -> None:
    rows = torch.zeros(8, 2)
    present = torch.tensor([True, False, True, True, False, True, True, True])
    sample = torch.tensor([0, 1, 0, 3, 4, 5, 5, 5])
    for position in range(0, 240, 8):
        facts = known(8, position)._replace(present=present, sample=sample)
        numbers, found = draw_negatives(rows, rows, facts, "test")
        assert torch.equal(found, present)
        assert present[numbers[present]].all()
        assert (sample[numbers[present]] != sample[present]).all()


def test_a_constant_predictor_costs_the_entropy_of_one_third() -> None:
    model = build_model({"itm": ITMConfig()})
    head = objective_of(model).head.predict
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([2.0, 1.0]).log())
    output = loss_of(model, rows_of(LENGTHS))
    assert output["loss"].item() == pytest.approx(0.6365, abs=1e-4)
    assert output["metric.itm_acc"].item() == pytest.approx(2 / 3)


def test_a_new_head_cannot_tell_pairs_from_others() -> None:
    assert loss_of(build_model({"itm": ITMConfig()}), rows_of(LENGTHS))["loss"].item() == pytest.approx(
        math.log(2), abs=0.05
    )


def one_by_one(model: MultimodalTransformer, rows: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Loss and accuracy over the pairs, from one fusion for each."""
    encoder, objective = model.encoder(rows), objective_of(model)
    image, text = encoder.tower("image"), encoder.tower("text")
    parts = {"first": encoder.embed("image").detach(), "second": encoder.embed("text").detach()}
    parts |= {"present": rows["image.present"] & rows["text.present"], "sample": rows["sample"], "draw": rows["draw"]}
    seconds, firsts = objective.negatives(parts)
    losses, right = [], []
    for row in parts["present"].nonzero().flatten().tolist():
        pairs = [(row, row, 1), (row, int(seconds.numbers[row]), 0), (int(firsts.numbers[row]), row, 0)]
        for first, second, target in pairs:
            tokens = {"image": image["tokens"][first][None], "text": text["tokens"][second][None]}
            fused = model.fusion(tokens, {"image": None, "text": rows["text.mask"][second][None]})["pooled"]
            logits = objective.head(fused)
            losses.append(functional.cross_entropy(logits, torch.tensor([target])))
            right.append(logits.argmax().item() == target)
    return torch.stack(losses).mean(), float(np.mean(right))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_loss_and_gradients_are_those_of_every_pair_fused_alone_in_any_number_of_chunks(chunks: int) -> None:
    model, rows = build_model({"itm": ITMConfig()}), rows_of(LENGTHS)
    rows["text.present"][1] = False
    rows["sample"][4] = rows["sample"][3]
    expected, accuracy = one_by_one(model, rows)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = loss_of(model, rows, chunks)
    output["loss"].backward()
    assert objective_of(model).count(rows).item() == 15
    torch.testing.assert_close(output["loss"], expected, rtol=0, atol=1e-6)
    assert output["metric.itm_acc"].item() == pytest.approx(accuracy)
    assert {"towers.image.stem.project.weight", "towers.text.stem.words.weight"} < gradients.keys()
    for name, gradient in gradients.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_what_stands_in_absent_rows_changes_nothing() -> None:
    model, rows = build_model({"itm": ITMConfig()}), rows_of(LENGTHS)
    rows["image.present"][2] = False
    before = loss_of(model, rows)["loss"]
    changed = rows["image"].clone()
    changed[2] = 255 - changed[2]
    assert torch.equal(loss_of(model, rows | {"image": changed})["loss"], before)


def test_a_batch_of_one_sample_asks_about_its_pair_alone() -> None:
    model, rows = build_model({"itm": ITMConfig()}), rows_of(LENGTHS[:2])
    rows["sample"][1] = rows["sample"][0]
    output = loss_of(model, rows)
    output["loss"].backward()
    assert output["loss"].item() == pytest.approx(math.log(2) / 3, abs=0.05)


def test_a_fusion_that_pools_nothing_is_refused() -> None:
    towers = {"kind": "native", "width": 8, "depth": 1, "heads": 1}
    stems = {
        "image": {"kind": "patches", "image_size": 8, "patch_size": 4},
        "text": {"kind": "embeddings", "context_length": 4, "vocab_size": 8},
    }
    config = ModelConfig.model_validate(
        {"embed_dim": 8, "towers": {modality: towers | {"stem": stem} for modality, stem in stems.items()}}
    )
    with pytest.raises(ConfigError, match="objective itm reads the fused pooled vector, but model.fusion.kind is late"):
        MultimodalTransformer.create(config, {"itm": ITMConfig()})
