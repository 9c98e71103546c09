"""SigLIP on one process against NumPy and open_clip; ring and gather are the same function."""

import math

import numpy as np
import pytest
import torch
from contrastive_reference import random_pairs, siglip
from open_clip.loss import SigLipLoss

from mmpretrain.objectives.base import ModelFacts
from mmpretrain.objectives.siglip import SigLIP, SigLIPConfig

FACTS = ModelFacts(embed_dim=6, towers={}, fusion_width=None)
EXCHANGES = pytest.mark.parametrize("exchange", ["ring", "gather"])


def build(**settings: object) -> SigLIP:
    return SigLIPConfig.model_validate(settings).build(FACTS).double()


@EXCHANGES
@pytest.mark.parametrize("tile", [1, 4, 11, 64])
def test_loss_and_gradients_equal_the_numpy_reference_for_any_tile(exchange: str, tile: int) -> None:
    objective, parts = build(implementation=exchange, tile=tile, bias_init=-3.0), random_pairs(11)
    parts["present"][[0, 7]] = False
    loss = objective.reduce(parts) / 9
    loss.backward()
    scale = math.exp(objective.logit_scale.log.item())
    first, second = (parts[name].detach().numpy() for name in ("first", "second"))
    expected = siglip(first, second, scale, -3.0, parts["present"].numpy())
    np.testing.assert_allclose(loss.item(), expected.loss, rtol=1e-12)
    np.testing.assert_allclose(parts["first"].grad, expected.first, atol=1e-12)
    np.testing.assert_allclose(parts["second"].grad, expected.second, atol=1e-12)
    np.testing.assert_allclose(objective.logit_scale.log.grad, [scale * expected.scale], atol=1e-12)
    np.testing.assert_allclose(objective.logit_bias.value.grad, [expected.bias], atol=1e-12)


@EXCHANGES
def test_loss_and_gradients_equal_those_of_open_clip(exchange: str) -> None:
    objective, parts, theirs = build(implementation=exchange, tile=4), random_pairs(10), random_pairs(10)
    (objective.reduce(parts) / 10).backward()
    log_scale = objective.logit_scale.log.detach().clone().requires_grad_()
    bias = objective.logit_bias.value.detach().clone().requires_grad_()
    loss = SigLipLoss()(theirs["first"], theirs["second"], log_scale.exp(), bias)
    loss.backward()
    torch.testing.assert_close(objective.reduce(parts) / 10, loss, rtol=1e-12, atol=0)
    for ours, reference in (
        (parts["first"], theirs["first"]),
        (parts["second"], theirs["second"]),
        (objective.logit_scale.log, log_scale),
        (objective.logit_bias.value, bias),
    ):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-12)


def test_fp32_keeps_the_small_gradient_of_a_pair_that_fits_well() -> None:
    """softplus(x) - x would lose it: the logit is 20, the gradient of the pair sigmoid(-20) = 2e-9."""
    parts = {"first": torch.eye(2).requires_grad_(), "second": torch.eye(2), "present": torch.ones(2, dtype=torch.bool)}
    objective = SigLIPConfig(scale_init=40.0, bias_init=-20.0).build(FACTS)
    objective.reduce(parts).backward()
    assert parts["first"].grad.diagonal().tolist() == pytest.approx([-40 / (1 + math.exp(20))] * 2, rel=1e-4)


def test_loss_starts_near_ten() -> None:
    objective, parts = build(), random_pairs(256, 512)
    assert (objective.reduce(parts) / 256).item() == pytest.approx(10, abs=0.2)
    metrics = objective.metrics(parts)
    assert metrics["logit_scale"].item() == pytest.approx(10)
    assert metrics["logit_bias"].item() == pytest.approx(-10)


@EXCHANGES
def test_absent_rows_get_exactly_zero_gradient(exchange: str) -> None:
    parts = random_pairs(6)
    parts["present"][[1, 5]] = False
    build(implementation=exchange, tile=2).reduce(parts).backward()
    for name in ("first", "second"):
        assert torch.equal(parts[name].grad[[1, 5]], torch.zeros(2, 6, dtype=torch.float64))
        assert parts[name].grad[[0, 2, 3, 4]].abs().min() > 0


def test_rows_that_find_their_pair_are_counted() -> None:
    objective, parts = build(tile=4), random_pairs(10, 3)
    objective.reduce(parts)
    cosines = (parts["first"] @ parts["second"].T).detach().numpy()
    expected = (cosines.argmax(1) == np.arange(10)).mean()
    assert objective.metrics(parts)["embed/in_batch_r1"].item() == pytest.approx(expected)


def test_no_block_of_logits_is_kept_for_the_backward() -> None:
    saved: list[int] = []
    parts = random_pairs(64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        build(tile=8).reduce(parts)
    assert max(saved) <= 64 * 6
