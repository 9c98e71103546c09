"""What evaluations leave to look at, read back from the offline files of W&B and from the report page of a real run."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Project
from PIL import Image

from mmpretrain.tracking.report import write_report
from mmpretrain.tracking.wandb_replay import replay

PICTURED = (
    "steps=12",
    "objectives.mim={kind: mae, mask_ratio: 0.5, decoder_width: 32, decoder_depth: 1, decoder_heads: 4}",
    "evaluation.tasks={retrieval: {kind: retrieval, samples: 2}, losses: {kind: losses, samples: 3}}",
    "tracking.trackers=[{kind: wandb, mode: offline}]",
)
SIZES = {"val/retrieved": (600, 120), "val/rebuilt_mim": (344, 112)}
"""Five thumbnails with their frames; three views with gaps."""


@pytest.fixture
def run(project: Project) -> Path:
    ended = project.train(*PICTURED)
    assert ended.code == 0, ended.stderr
    return project.output


def media_of(run: Path) -> dict[str, dict[str, list[str]]]:
    """Name -> what W&B's own inspector tells of the pictures that were logged under it."""
    folder = max(run.glob("wandb/offline-run-*"))
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", folder]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]
    return {
        name: {
            "captions": row[f"{name}.captions"],
            "paths": [str(folder / "files" / file) for file in row[f"{name}.filenames"]],
        }
        for row in rows
        for name in SIZES
        if f"{name}.filenames" in row
    }


def test_pictures_reach_wandb_and_the_report_as_they_lie_in_the_run_folder(run: Path) -> None:
    listed = json.loads((run / "evaluation" / "pictures.json").read_text())
    logged = media_of(run)
    replay(run, offline=True)
    assert [one["captions"] for one in media_of(run).values()] == [one["captions"] for one in logged.values()]
    assert set(listed) == set(logged) == set(SIZES)
    assert [len(listed[name]) for name in SIZES] == [2, 3]
    for name, shown in listed.items():
        assert logged[name]["captions"] == [one["caption"] for one in shown]
        for one, path in zip(shown, logged[name]["paths"], strict=True):
            with Image.open(run / "evaluation" / one["file"]) as ours, Image.open(path) as theirs:
                assert ours.size == theirs.size == SIZES[name]
                assert ours.convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
    page = write_report(run).read_text(encoding="utf-8")
    embedded = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    assert [Image.open(io.BytesIO(png)).size for png in embedded] == [SIZES["val/rebuilt_mim"]] * 3
    assert all(one["caption"] in page for one in listed["val/rebuilt_mim"])
    assert all(
        re.search(r" \((right one at place \d|not among them)\)$", one["caption"]) for one in listed["val/retrieved"]
    )
