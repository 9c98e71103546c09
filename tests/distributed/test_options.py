"""Options that trade memory for time give the same numbers; bf16 and fp16 give the same ones at every ZeRO stage."""

import json
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from launch import run_ranks
from left_images import left_images
from plain_training import train_plainly

from mmpretrain.models.multimodal import MultimodalTransformer


def run_cases(folder: Path) -> None:
    cases.options(folder)
    left_images(folder)
    cases.held_updates()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    run_ranks(2, run_cases, folder)
    return folder


@pytest.fixture(scope="module")
def losses(folder: Path) -> dict[str, list[float]]:
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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_rounds_less_and_clips_by_the_norm_of_what_was_not_scaled(
    losses: dict[str, list[float]], stage: int
) -> None:
    rounded, exact = losses[f"fp16-zero{stage}"], losses["plain-zero0"]
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_on_parts_of_matrices_trains_as_torch_does_on_whole_ones(
    losses: dict[str, list[float]], plain_muon: list[float], stage: int
) -> None:
    """bf16 in the iterations turns the last bits of a gradient into 2^-8 of an update of 1e-3."""
    assert losses[f"muon-zero{stage}"] == pytest.approx(plain_muon, abs=1e-4)
    assert plain_muon != pytest.approx(losses["plain-zero0"], abs=1e-3), "it is another optimizer"


def test_images_left_to_the_device_train_as_their_pixels_do(folder: Path) -> None:
    for rank in range(2):
        jpegs, pixels = (json.loads((folder / f"{name}-{rank}.json").read_text()) for name in ("jpegs", "pixels"))
        assert jpegs == pixels and jpegs.keys() == {"itc", "mlm"}


@pytest.fixture(scope="module")
def plain_muon() -> list[float]:
    """One process, torch's own optimizers."""
    return train_plainly("spanning", cases.OPTION_STEPS, optimizers=_muon_and_adamw)[0]


def _muon_and_adamw(model: MultimodalTransformer) -> list[torch.optim.Optimizer]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in named.items() if ".blocks." in name and p.dim() == 2]
    others = [p for p in named.values() if all(p is not matrix for matrix in hidden)]
    decayed = [p for p in others if sum(size > 1 for size in p.shape) >= 2]
    bare = [p for p in others if sum(size > 1 for size in p.shape) < 2]
    adamw = [{"params": decayed, "weight_decay": 0.1}, {"params": bare, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=cases.LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=cases.LR, betas=(0.9, 0.98), eps=1e-6),
    ]
