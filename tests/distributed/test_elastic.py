"""A checkpoint of 2 ranks under ZeRO-2, written while they train on, restores at other ranks and stages: weights and
moments bitwise, and the next ten losses."""

import json
from pathlib import Path

import deepspeed
import engine_cases as cases
import pytest
import torch
from launch import run_ranks
from safetensors.torch import load_file

RANKS = (1, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run_ranks(2, cases.write_checkpoint, folder)
    for ranks in RANKS:
        run_ranks(ranks, cases.read_checkpoint, folder)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_restores_at_any_ranks_and_stage(folder: Path, stage: int, ranks: int) -> None:
    case = f"read-spanning-zero{stage}-ranks{ranks}-accumulation1"
    written, read = load_file(folder / "written.safetensors"), load_file(folder / f"{case}.safetensors")
    assert set(read) == set(written)
    for name, value in written.items():
        assert torch.equal(read[name], value), name
    after, whole = (json.loads((folder / f"{name}.json").read_text()) for name in (case, "written"))
    assert len(after) == len(whole) == 10
    assert after[:5] == pytest.approx(whole[:5], abs=1e-6)
    assert after == pytest.approx(whole, abs=1e-5)


def test_this_is_the_release_whose_fragments_are_known() -> None:
    assert deepspeed.__version__ == "0.19.8", "fragments.py knows the internals of 0.19.8 alone"
