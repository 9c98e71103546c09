"""InfoNCE on one process against NumPy and open_clip: value, gradients, absent rows, the bound of the scale."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from contrastive_reference import infonce, random_pairs
from open_clip.loss import ClipLoss
from pydantic import ValidationError
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.layers.scale import LogitScale
from mmpretrain.layers.softmax_pairs import pair_sums
from mmpretrain.objectives.base import ModelFacts, TowerFacts
from mmpretrain.objectives.infonce import InfoNCE, InfoNCEConfig
from mmpretrain.objectives.pairs import encode_pairs, pair_metrics

FACTS = ModelFacts(embed_dim=6, towers={m: TowerFacts(6, 4, 0) for m in ("image", "text")}, fusion_width=None)


@dataclass
class Embeddings:
    """An encoder whose embeddings are given."""

    batch: TensorDict
    image: Tensor
    text: Tensor

    def embed(self, modality: str) -> Tensor:
        return {"image": self.image, "text": self.text}[modality]


def as_numpy(parts: TensorDict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(parts[name].detach().numpy() for name in ("first", "second", "present"))


def build(**settings: object) -> InfoNCE:
    return InfoNCEConfig.model_validate(settings).build(FACTS).double()


@pytest.mark.parametrize("tile", [1, 3, 5, 11, 64])
def test_loss_and_gradients_equal_the_numpy_reference_for_any_tile(tile: int) -> None:
    objective, parts = build(tile=tile), random_pairs(11)
    parts["present"][[2, 7]] = False
    loss = objective.reduce(parts) / 9
    loss.backward()
    scale = math.exp(objective.logit_scale.log.item())
    expected = infonce(*as_numpy(parts)[:2], scale, as_numpy(parts)[2])
    np.testing.assert_allclose(loss.item(), expected.loss, rtol=1e-12)
    np.testing.assert_allclose(parts["first"].grad, expected.first, atol=1e-12)
    np.testing.assert_allclose(parts["second"].grad, expected.second, atol=1e-12)
    np.testing.assert_allclose(objective.logit_scale.log.grad, [scale * expected.scale], atol=1e-12)


def test_fp32_loss_and_gradients_are_within_1e_6_of_float64() -> None:
    objective, parts = InfoNCEConfig(tile=16).build(FACTS), random_pairs(50, 32, torch.float32)
    loss = objective.reduce(parts) / 50
    loss.backward()
    expected = infonce(*(a.astype(np.float64) for a in as_numpy(parts)[:2]), 1 / 0.07, np.ones(50, dtype=bool))
    assert abs(loss.item() - expected.loss) < 1e-6
    np.testing.assert_allclose(parts["first"].grad, expected.first, atol=1e-6)
    np.testing.assert_allclose(parts["second"].grad, expected.second, atol=1e-6)


def test_loss_and_gradients_equal_those_of_open_clip() -> None:
    objective, parts, theirs = build(tile=4), random_pairs(10), random_pairs(10)
    (objective.reduce(parts) / 10).backward()
    log_scale = objective.logit_scale.log.detach().clone().requires_grad_()
    loss = ClipLoss(local_loss=True, gather_with_grad=True)(theirs["first"], theirs["second"], log_scale.exp())
    loss.backward()
    torch.testing.assert_close(objective.reduce(parts) / 10, loss, rtol=1e-12, atol=0)
    for name in ("first", "second"):
        torch.testing.assert_close(parts[name].grad, theirs[name].grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(objective.logit_scale.log.grad, log_scale.grad, rtol=0, atol=1e-12)


def test_loss_starts_near_the_logarithm_of_the_batch() -> None:
    parts = random_pairs(256, 512)
    assert (build().reduce(parts) / 256).item() == pytest.approx(math.log(256), abs=0.3)


def test_absent_rows_change_nothing_and_get_exactly_zero_gradient() -> None:
    whole, few = random_pairs(8), random_pairs(8)
    present = torch.tensor([True, False, True, True, False, True, True, True])
    few = {name: tensor.detach()[present].requires_grad_(tensor.requires_grad) for name, tensor in few.items()}
    image = whole["first"].detach().masked_fill(~present[:, None], torch.nan).requires_grad_()
    text = whole["second"].detach().requires_grad_()
    batch = {"image.present": present, "text.present": torch.ones(8, dtype=torch.bool)}
    objective = build(tile=3)
    loss, expected = (
        objective.reduce(encode_pairs(Embeddings(batch, image, text), ("image", "text"))),
        build().reduce(few),
    )
    loss.backward()
    expected.backward()
    assert objective.count(batch).item() == 6
    torch.testing.assert_close(loss, expected)
    for tensor, reference in ((image, few["first"]), (text, few["second"])):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad[~present], torch.zeros(2, 6, dtype=torch.float64))
        torch.testing.assert_close(tensor.grad[present], reference.grad)


def test_a_batch_without_any_pair_has_loss_and_gradient_zero() -> None:
    parts = random_pairs(4)
    parts["present"][:] = False
    loss = build(tile=3).reduce(parts)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(parts["first"].grad, torch.zeros(4, 6, dtype=torch.float64))


def test_a_batch_that_does_not_say_who_is_present_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"text\.present"):
        build().count({"image.present": torch.ones(2, dtype=torch.bool)})


def test_autocast_does_not_round_the_logits() -> None:
    plain, cast = random_pairs(64, 32, torch.float32), random_pairs(64, 32, torch.float32)
    objective = InfoNCEConfig(tile=16, scale_init=100).build(FACTS)
    expected = objective.reduce(plain)
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective.reduce(cast)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(cast["first"].grad, plain["first"].grad)


def test_the_scale_stops_at_its_bound_but_can_come_back() -> None:
    scale = LogitScale(initial=120.0, maximum=100.0)
    assert scale().item() == pytest.approx(100.0)
    scale().sum().neg().backward()
    assert scale.log.grad.item() == 0
    scale.log.grad = None
    scale().sum().backward()
    assert scale.log.grad.item() == pytest.approx(100.0)


def test_the_scale_below_its_bound_has_the_gradient_of_exp() -> None:
    scale = LogitScale(initial=5.0, maximum=100.0)
    scale().sum().neg().backward()
    assert scale.log.grad.item() == pytest.approx(-5.0)
    assert scale.log.shape == (1,)


def test_no_row_of_negatives_is_kept_for_the_backward() -> None:
    saved: list[int] = []
    parts = random_pairs(64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        build(tile=8).reduce(parts)
    assert max(saved) <= 64 * 6


def test_metrics_equal_their_definitions() -> None:
    objective, parts = build(), random_pairs(9, 3)
    parts["present"][4] = False
    for name in ("first", "second"):
        parts[name] = parts[name].detach().masked_fill(~parts["present"][:, None], 0.0)
    objective.reduce(parts)
    metrics = {name: value.item() for name, value in objective.metrics(parts).items()}
    u, v, present = as_numpy(parts)
    u, v = u[present], v[present]
    cosines = u @ v.T
    others = cosines[~np.eye(8, dtype=bool)]
    assert metrics == pytest.approx(
        {
            "logit_scale": 1 / 0.07,
            "embed/pos_sim": np.diag(cosines).mean(),
            "embed/neg_sim": others.mean(),
            "embed/modality_gap": np.linalg.norm(u.mean(0) - v.mean(0)),
            "embed/in_batch_r1": (cosines.argmax(1) == np.arange(8)).mean(),
        },
        rel=1e-6,
    )


def test_collapsed_embeddings_win_nothing() -> None:
    parts = {"first": torch.ones(8, 4) / 2, "second": torch.ones(8, 4) / 2, "present": torch.ones(8, dtype=torch.bool)}
    parts["wins"] = pair_sums(parts["first"], parts["second"], parts["present"], 3).wins
    assert pair_metrics(parts)["embed/in_batch_r1"].item() == 0


def test_a_modality_paired_with_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="name two different ones"):
        InfoNCEConfig(pair=("image", "image"))
