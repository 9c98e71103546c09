"""Options that trade memory for time give the same numbers; bf16 gives the same ones at every ZeRO stage."""

import json

import engine_cases as cases
import pytest
from launch import run_ranks


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("options")
    run_ranks(2, cases.options, folder)
    suffix = "-ranks2-accumulation2.json"
    return {
        path.name.removesuffix(suffix).replace("-spanning-", "-"): json.loads(path.read_text())
        for path in folder.glob(f"*{suffix}")
    }


@pytest.mark.parametrize(
    "case", ["checkpointing-zero1", "checkpointing-zero3", "offload-zero1", "offload-zero2", "offload-zero3"]
)
def test_memory_options_change_no_number(losses: dict[str, list[float]], case: str) -> None:
    assert losses[case] == pytest.approx(losses["plain-zero0"], abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_the_same_at_every_stage(losses: dict[str, list[float]], stage: int) -> None:
    assert losses[f"bf16-zero{stage}"] == pytest.approx(losses["bf16-zero0"], abs=5e-3)
    assert losses[f"bf16-zero{stage}"][0] == losses["bf16-zero0"][0], "the first forward has no rounding in between"


def test_bf16_rounds_and_stays_near_fp32(losses: dict[str, list[float]]) -> None:
    rounded, exact = losses["bf16-zero0"], losses["plain-zero0"]
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.05)
