"""N ranks, any accumulation and any ZeRO stage compute what one plain PyTorch process computes."""

import json
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from launch import run_ranks
from plain_training import train_plainly
from safetensors.torch import load_file


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
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("objectives", "accumulation"), [("spanning", 1), ("spanning", 2), ("spanning", 4), ("rows", 4)]
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


def test_the_reference_learns(results: Path) -> None:
    losses = json.loads((results / "plain-spanning.json").read_text())
    assert losses[-1] < losses[0] - 0.05, losses
