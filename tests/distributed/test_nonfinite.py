"""A loss that is NaN on one rank: all ranks skip the step together, at every stage, and go on."""

import json
import math
from pathlib import Path

import engine_cases as cases
import pytest
from launch import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nan")
    run_ranks(2, cases.nan_on_one_rank, folder)
    return folder


@pytest.mark.parametrize("objectives", ["spanning", "rows"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_skip_together_and_go_on(folder: Path, objectives: str, stage: int) -> None:
    for rank in range(2):
        case = f"nan-{objectives}-zero{stage}-ranks2-accumulation2-rank{rank}"
        verdict = json.loads((folder / f"{case}.json").read_text())
        assert verdict["skipped"] and verdict["unchanged"], (case, verdict)
        assert math.isfinite(verdict["next"]) and verdict["moved"], (case, verdict)
