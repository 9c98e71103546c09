"""A short run of the fuzzer, whose long one is `python tests/fuzz.py --seconds 600`."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guard import Breach, only_within
from mutations import mutated

FUZZ = Path(__file__).parents[1] / "fuzz.py"


def test_seconds_of_changed_inputs_at_every_door_find_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ), "--seconds", "3", "--seed", "7", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = [int(count) for count in re.findall(r"^\w+ +(\d+) inputs", done.stdout, re.MULTILINE)]
    assert len(counts) == 13 and min(counts) > 0 and sum(counts) > 500, done.stdout


def test_the_guard_sees_a_file_elsewhere_a_program_and_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(Breach, match="read .*/secret"), only_within(tmp_path / "inside"):
        (tmp_path / "secret").read_text()
    with pytest.raises(Breach, match="wrote .*/new"), only_within(tmp_path / "inside"):
        (tmp_path / "new").write_text("")
    with pytest.raises(Breach, match="subprocess.Popen"), only_within(tmp_path / "inside"):
        subprocess.run(["true"], check=True)
    with only_within(tmp_path / "inside"):
        (tmp_path / "inside" / "own").write_text("")


def test_the_same_seed_changes_the_same_bytes() -> None:
    content = bytes(range(256)) * 8
    once, again, other = (mutated(content, random.Random(seed)) for seed in ("1:a", "1:a", "1:b"))
    assert once == again != other != content
