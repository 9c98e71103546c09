"""Every kind of tower trains on two ranks, partitioned, as in one plain process that holds the whole batch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import tower_cases as cases
from launch import run_ranks
from tiny_encoders import save_encoders
from torchvision.models import resnet18

GROUPS = tuple(cases.groups(Path()))
Found = Mapping[str, list[dict[str, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_encoders(folder)
    network = resnet18()
    network(torch.randn(8, 3, 64, 64))  # statistics that are not those of a fresh network
    torch.save(network.state_dict(), folder / "resnet18.pth")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    run_ranks(2, cases.train_all, folder)
    results: Found = json.loads((folder / "found.json").read_text())
    return results


def train_plainly(folder: Path, group: str) -> list[dict[str, float]]:
    """One process, torch's AdamW, the whole batch at once: as `tower_cases.train`."""
    config = cases.run_config(cases.groups(folder)[group], 0)
    model, batch = cases.build_model(config).train(), cases.rows(config.model)
    matrices = [p for p in model.parameters() if sum(size > 1 for size in p.shape) >= 2]
    vectors = [p for p in model.parameters() if sum(size > 1 for size in p.shape) < 2]
    decay = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decay, lr=cases.LR, betas=config.optimizer.betas, eps=cases.EPS)
    scales = {name: 1 / count for name, count in model.counts([batch]).items()}
    before = model([batch], scales)
    before["loss"].backward()
    for unused in (p for p in model.parameters() if p.grad is None):
        unused.grad = torch.zeros_like(unused)  # torch would spare it the weight decay as well
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    with torch.no_grad():
        after = model([batch], scales)
    losses = [{name: (outputs[f"sum.{name}"] * scales[name]).item() for name in scales} for outputs in (before, after)]
    return [losses[0] | {"grad_norm": norm.item()}, losses[1]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks have: deep networks in fp32 show in the fourth digit how a convolution was split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("group", GROUPS)
def test_towers_train_on_two_partitioned_ranks_as_in_one_plain_process(folder: Path, found: Found, group: str) -> None:
    before, after = train_plainly(folder, group)
    assert any(abs(before[name] - loss) > 1e-4 for name, loss in after.items()), "the step changes losses"
    for stage in cases.stages(group):
        ours = found[f"{group}-zero{stage}"]
        assert ours[0].pop("grad_norm") == pytest.approx(before["grad_norm"], rel=1e-4), stage
        assert ours[0] == pytest.approx({name: before[name] for name in after}, rel=1e-5), stage
        assert ours[1] == pytest.approx(after, rel=1e-5), stage
