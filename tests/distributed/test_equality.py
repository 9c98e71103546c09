"""N ranks, any accumulation and any ZeRO stage compute what one plain PyTorch process computes."""

import json
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
import torch
from contrastive_reference import Reference, infonce, siglip
from launch import run_ranks
from plain_towers import image_embeddings, text_embeddings
from plain_training import train_plainly
from safetensors.torch import load_file
from torch import Tensor


def plain_pytorch(folder: Path, objectives: str) -> None:
    losses, model = train_plainly(objectives, cases.STEPS)
    state = {f"master/{name}": p.detach().flatten() for name, p in model.named_parameters()}
    cases.leave_results(folder, f"plain-{objectives}", losses, state)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    for objectives in ("spanning", "rows"):
        plain_pytorch(folder, objectives)
    for ranks in (1, 2, 4):
        run_ranks(ranks, cases.equality, folder)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("objectives", "ranks", "accumulation"),
    [*(("spanning", ranks, times) for ranks in (1, 2, 4) for times in (1, 2, 4)), ("rows", cases.ROWS_RANKS, 4)],
)
def test_losses_and_weights_equal_one_plain_process(
    results: Path, objectives: str, stage: int, ranks: int, accumulation: int
) -> None:
    case = f"{objectives}-zero{stage}-ranks{ranks}-accumulation{accumulation}"
    expected = json.loads((results / f"plain-{objectives}.json").read_text())
    losses = json.loads((results / f"{case}.json").read_text())
    assert len(losses) == 10 and losses == pytest.approx(expected, abs=1e-5)
    weights = load_file(results / f"{case}.safetensors")
    for name, value in load_file(results / f"plain-{objectives}.safetensors").items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def whole_batch() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and all gradients of the global batch in one piece, in float64: contrasts by NumPy, towers by plain
    PyTorch."""
    config = cases.run_config("caching", 0, cases.GLOBAL_BATCH, **cases.CACHING)
    parameters = cases.build_model(config).named_parameters()
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters}
    rows = cases.batch(range(cases.GLOBAL_BATCH), lacking=True).tensors
    first, second = image_embeddings(weights, rows, 4, heads=4, drop=0.5), text_embeddings(weights, rows, heads=4)
    found: dict[str, Reference] = {}
    for name in ("itc", "ring", "gather"):
        scale = weights[f"objectives.{name}.logit_scale.log"].exp().item()
        inputs = (first.detach().numpy(), second.detach().numpy(), scale)
        bias = () if name == "itc" else (weights[f"objectives.{name}.logit_bias.value"].item(),)
        found[name] = (siglip if bias else infonce)(*inputs, *bias, present=rows["text.present"].numpy())
    weigh = {name: config.objectives[name].weight for name in found}
    sides = [sum(weigh[name] * getattr(one, side) for name, one in found.items()) for side in ("first", "second")]
    torch.autograd.backward([first, second], [torch.tensor(side) for side in sides])
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for name, one in found.items():
        scale = weights[f"objectives.{name}.logit_scale.log"].exp().item()
        gradients[f"objectives.{name}.logit_scale.log"] = torch.tensor([weigh[name] * one.scale * scale])
        if name != "itc":
            gradients[f"objectives.{name}.logit_bias.value"] = torch.tensor([weigh[name] * one.bias])
    assert gradients.keys() == weights.keys()
    return {name: one.loss for name, one in found.items()}, gradients


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_chunks_tiles_and_dropped_patches_give_the_loss_and_gradients_of_the_whole_batch_in_float64(
    results: Path, whole_batch: tuple[dict[str, float], dict[str, Tensor]], chunks: int, ranks: int, stage: int
) -> None:
    case = f"caching-zero{stage}-ranks{ranks}-accumulation{chunks}"
    losses, gradients = whole_batch
    found = json.loads((results / f"{case}.json").read_text())
    np.testing.assert_allclose(found, [losses[name] for name in sorted(losses)], rtol=2e-6)
    moments = load_file(results / f"{case}.safetensors")
    for name, expected in gradients.items():
        error = (moments[f"exp_avg/{name}"].double() - expected.flatten()).norm()
        assert error <= 5e-6 * expected.norm() + 1e-8, (name, error.item(), expected.norm().item())


def test_the_reference_learns(results: Path) -> None:
    losses = json.loads((results / "plain-spanning.json").read_text())
    assert losses[-1] < losses[0] - 0.05, losses
