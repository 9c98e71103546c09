"""A moving-average teacher and average, scheduled weights and matching at every ZeRO stage, against plain PyTorch."""

import json
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
import torch
from launch import run_ranks
from plain_training import train_plainly
from safetensors.torch import load_file

from mmpretrain.models.multimodal import MultimodalTransformer

TEACHER = "objectives.features.teacher.network."
TAU = {1: 0.7, 2: 0.9, 3: 0.9}
"""From 0.5 to 0.9 over two steps."""


def follow(model: MultimodalTransformer, step: int) -> None:
    """The teacher's recurrence and the weight of the next step, written out."""
    parameters = dict(model.named_parameters())
    for name in (name for name in parameters if name.startswith(TEACHER)):
        student = parameters[f"towers.image.{name.removeprefix(TEACHER)}"].detach()
        tau = TAU.get(step, 0.0)
        parameters[name].data = tau * parameters[name].data + (1 - tau) * student
    model.weights["itc"] = float(np.interp(step, [0, 2], [1.0, 0.25]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run_ranks(2, cases.teacher, folder)
    average: dict[str, torch.Tensor] = {}

    def around(model: MultimodalTransformer, step: int) -> None:
        follow(model, step)
        kept = {0: 0.0, 1: 2 / 11, 2: 3 / 12, 3: 0.3}[step]
        for name, parameter in model.named_parameters():
            average[name] = kept * average.get(name, parameter.detach()) + (1 - kept) * parameter.detach()

    losses, model = train_plainly("features", 3, around)
    state = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    averages = {f"average/{name}": average[name].flatten() for name, p in model.named_parameters() if p.requires_grad}
    cases.leave_results(folder, "plain", losses, state | averages)
    return folder


def verdicts(folder: Path, stage: int) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"verdict-features-zero{stage}-*"))]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_weights_and_teacher_equal_one_plain_process(folder: Path, stage: int) -> None:
    case = f"features-zero{stage}-ranks2-accumulation2"
    expected = json.loads((folder / "plain.json").read_text())
    assert json.loads((folder / f"{case}.json").read_text()) == pytest.approx(expected, abs=1e-5)
    found, plain = load_file(folder / f"{case}.safetensors"), load_file(folder / "plain.safetensors")
    assert sum(name.startswith(TEACHER) for name in plain) == 20
    for name, value in plain.items():
        key = "" if name.startswith("average/") else "replica/" if name.startswith(TEACHER) else "master/"
        torch.testing.assert_close(found[key + name], value, atol=1e-5, rtol=0, msg=name)
    assert not any(name.startswith(("exp_avg", "master", "average")) and TEACHER in name for name in found)
    moved = [name for name in plain if name.startswith("average/") and not torch.equal(found[name], plain[name[8:]])]
    assert len(moved) > 30, "an average is not the last weights"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_restores_teacher_and_average_at_another_stage(folder: Path, stage: int) -> None:
    for verdict in verdicts(folder, stage):
        assert verdict["equal"]
        assert verdict["there"] == pytest.approx(verdict["after"], abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_leaves_teacher_and_average_as_they_were(folder: Path, stage: int) -> None:
    found = verdicts(folder, stage)
    assert len(found) == 2
    assert all(verdict["skipped"] and verdict["still"] for verdict in found)
