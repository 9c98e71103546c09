"""A save that is killed leaves a valid checkpoint, and a flipped bit in any file of one is found and named."""

import json
import logging
import random
import shutil
from pathlib import Path

import killed_cases as cases
import pytest
from launch import run_ranks

from mmpretrain.core.errors import CheckpointError
from mmpretrain.training.checkpoint import find_newest_valid
from mmpretrain.training.manifest import read_manifest
from mmpretrain.training.trained import open_trained

SEED, KILLS = 20, 20
FLIPS = 50
"""In each file."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_ranks(1, cases.killed_saves, folder, SEED, KILLS)
    return folder


def test_a_save_killed_at_any_moment_leaves_the_checkpoint_before_or_the_new_one(folder: Path) -> None:
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == KILLS
    assert all(trial["equal"] for trial in trials)
    assert {trial["step"] for trial in trials} <= {1, 2}
    assert any(trial["partial"] for trial in trials), trials


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "config.yaml", "manifest.json"])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (checkpoint,) = (folder / "before").glob("step-*")
    assert {path.name for path in checkpoint.iterdir()} == {"rank-00000.safetensors", "config.yaml", "manifest.json"}
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    assert find_newest_valid(tmp_path) == (copy, read_manifest(checkpoint))
    bits, draw = 8 * (copy / name).stat().st_size, random.Random(SEED)
    for bit in (0, bits - 1, *(draw.randrange(bits) for _ in range(FLIPS))):
        flip(copy / name, bit)
        with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="no valid checkpoint among 1"):
            find_newest_valid(tmp_path)
        assert f"checkpoint {copy} is damaged" in caplog.messages[-1] and name in caplog.messages[-1], bit
        flip(copy / name, bit)
    assert find_newest_valid(tmp_path)[0] == copy


def test_a_checkpoint_of_the_format_before_is_still_read(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "before").glob("step-*")
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    raw = json.loads((copy / "manifest.json").read_text())
    del raw["sha256"], raw["files"]["config.yaml"]
    (copy / "manifest.json").write_text(json.dumps(raw | {"format": 1}))
    assert find_newest_valid(tmp_path)[0] == copy


def test_a_checkpoint_opened_by_its_own_name_is_checked_before_its_config_is_read(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "before").glob("step-*")
    copy = tmp_path / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    flip(copy / "config.yaml", 13)
    with pytest.raises(CheckpointError, match="config.yaml does not match its SHA-256"):
        open_trained(copy)
