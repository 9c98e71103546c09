"""N ranks, any accumulation and any ZeRO stage compute what one plain PyTorch process computes."""

import json
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent


def plain_pytorch(folder: Path, objectives: str) -> None:
    """The reference: one process, no DeepSpeed, torch's AdamW, the whole batch in one forward."""
    import engine_cases as cases

    config = cases.run_config(objectives, 0, cases.GLOBAL_BATCH)
    model = cases.build_model(config)
    decayed = [p for p in model.parameters() if sum(size > 1 for size in p.shape) >= 2]
    others = [p for p in model.parameters() if sum(size > 1 for size in p.shape) < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=cases.LR,
        betas=config.optimizer.betas,
        eps=1e-6,
    )
    losses = []
    for step in range(cases.STEPS):
        batch = cases.batch(range(step * cases.GLOBAL_BATCH, (step + 1) * cases.GLOBAL_BATCH)).tensors
        counts = model.counts([batch])
        loss = model([batch], {name: 1 / count for name, count in counts.items()})["loss"]
        optimizer.zero_grad()
        loss.backward()
        for unused in (p for p in model.parameters() if p.grad is None):
            unused.grad = torch.zeros_like(unused)  # torch would spare it the weight decay as well
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    state = {f"master/{name}": p.detach().flatten() for name, p in model.named_parameters()}
    cases.leave_results(folder, f"plain-{objectives}", losses, state)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equality")
    for objectives in ("spanning", "rows"):
        plain_pytorch(folder, objectives)
    for ranks in (1, 2, 4):
        run_ranks(ranks, [str(HERE / "engine_cases.py"), "equality", str(folder)])
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("objectives", "accumulation"), [("spanning", 1), ("spanning", 2), ("spanning", 4), ("rows", 2), ("rows", 4)]
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
