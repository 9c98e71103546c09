"""A checkpoint of 2 ranks under ZeRO-2 restores at other ranks and stages: weights and moments bitwise."""

import json
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent
RANKS = (1, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run_ranks(2, [str(HERE / "engine_cases.py"), "write", str(folder)])
    for ranks in RANKS:
        run_ranks(ranks, [str(HERE / "engine_cases.py"), "read", str(folder)])
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_restores_at_any_ranks_and_stage(folder: Path, stage: int, ranks: int) -> None:
    case = f"read-spanning-zero{stage}-ranks{ranks}-accumulation1"
    written, read = load_file(folder / "written.safetensors"), load_file(folder / f"{case}.safetensors")
    assert set(read) == set(written)
    for name, value in written.items():
        assert torch.equal(read[name], value), name
    after = json.loads((folder / f"{case}.json").read_text())
    assert after == pytest.approx(json.loads((folder / "written.json").read_text()), abs=1e-6)
