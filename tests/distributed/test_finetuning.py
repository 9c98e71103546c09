"""Fine-tuning on 2 ranks equals plain PyTorch at every ZeRO stage, and what is frozen stays bitwise as it was."""

import json
from pathlib import Path

import finetune_cases as cases
import pytest
import torch
from engine_cases import GLOBAL_BATCH, LR, batch
from launch import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from mmpretrain.models.multimodal import MultimodalTransformer


def share(name: str, decay: float) -> float:
    """BEiT's shares of the rate in towers of two blocks, written out."""
    if not name.startswith("towers.") or ".norm." in name.replace("blocks", ""):
        return 1.0
    exponent = 1 if "blocks.1." in name else 2 if "blocks.0." in name else 3
    return float(decay**exponent)


def plain_pytorch(case: str) -> tuple[list[float], MultimodalTransformer]:
    """One process, no DeepSpeed, torch's AdamW with a group for every parameter."""
    config = cases.config_of(case, 0, GLOBAL_BATCH)
    assert config.finetune is not None
    model = cases.build(config)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay = config.finetune.layer_decay
    groups = [
        {
            "params": [p],
            "lr": LR * share(name, decay),
            "weight_decay": 0.1 if sum(size > 1 for size in p.shape) >= 2 else 0.0,
        }
        for name, p in learning.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=1e-6)
    losses = []
    for step in range(cases.STEPS):
        rows = batch(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)).tensors
        counts = model.counts([rows])
        loss = model([rows], {name: 1 / count for name, count in counts.items()})["loss"]
        optimizer.zero_grad()
        loss.backward()
        for unused in (p for p in learning.values() if p.grad is None):
            unused.grad = torch.zeros_like(unused)
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    run_ranks(2, cases.check_all, folder)
    return folder


def initial(case: str) -> dict[str, Tensor]:
    return {name: p.detach().flatten() for name, p in cases.build(cases.config_of(case, 0, 1)).named_parameters()}


@pytest.mark.parametrize("case", cases.CASES)
def test_every_stage_equals_one_plain_process(results: Path, case: str) -> None:
    expected, model = plain_pytorch(case)
    for stage in cases.STAGES[case]:
        assert json.loads((results / f"{case}-zero{stage}.json").read_text()) == pytest.approx(expected, abs=1e-5)
        state = load_file(results / f"{case}-zero{stage}.safetensors")
        for name, parameter in model.named_parameters():
            key = f"{'master' if parameter.requires_grad else 'replica'}/{name}"
            torch.testing.assert_close(state[key], parameter.detach().flatten(), atol=2e-5, rtol=0, msg=key)


@pytest.mark.parametrize("case", ["last-block", "heads", "locked", "lora"])
def test_frozen_weights_stay_bitwise_and_the_others_move(results: Path, case: str) -> None:
    before = initial(case)
    frozen = {name for name, p in cases.build(cases.config_of(case, 0, 1)).named_parameters() if not p.requires_grad}
    assert frozen and len(frozen) < len(before)
    for stage in cases.STAGES[case]:
        state = load_file(results / f"{case}-zero{stage}.safetensors")
        assert {name for name in before if f"replica/{name}" in state} == frozen
        assert not any(key.endswith(tuple(frozen)) for key in state if key.startswith("exp_avg"))
        for name, value in before.items():
            if name in frozen:
                assert torch.equal(state[f"replica/{name}"], value), (stage, name)
        adapters = [name for name in before if "lora_" in name]
        assert all(not torch.equal(state[f"master/{name}"], before[name]) for name in adapters)


@pytest.mark.parametrize(("case", "stage"), [pair for pair in cases.PAIRS if pair[0] in cases.RESTORED])
def test_a_checkpoint_brings_frozen_and_learning_weights_to_another_stage(results: Path, case: str, stage: int) -> None:
    verdict = json.loads((results / f"{case}-zero{stage}.restored.json").read_text())
    assert verdict["names"] == [] and verdict["changed"] == []
    assert verdict["next"][1] == pytest.approx(verdict["next"][0], abs=1e-6)
