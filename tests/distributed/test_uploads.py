"""Copies of checkpoints in an object store: brought there beside training, whole, and enough to go on from."""

import json
import logging
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import upload_cases as cases
from child_processes import children
from launch import run_ranks
from object_stores import s3_server
from s3fs import S3FileSystem

from data_pipeline.make import make
from mmpretrain.core.errors import CheckpointError
from mmpretrain.tracking.base import RunFacts
from mmpretrain.tracking.fanout import build_trackers
from mmpretrain.training.fetching import fetch_newest
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.uploads import Uploads

CONFIG = """
steps: 6
precision: fp32
global_batch_size: 8
micro_batch_size: 8
checkpoint: {every: 3}
model:
  embed_dim: 32
  towers:
    image: {kind: native, stem: {kind: patches, image_size: 16, patch_size: 8}, width: 32, depth: 1, heads: 2}
    text: {kind: native, stem: {kind: embeddings, context_length: 8}, width: 32, depth: 1, heads: 2}
objectives: {itc: {kind: infonce}}
data: {tokenizer: {train_vocab_size: 300}, workers: 0}
schedule: {warmup: 0}
"""
FILES = {"config.yaml", "manifest.json", "rank-00000.safetensors"}


@dataclass(frozen=True)
class Stored:
    """Runs in a folder, and the store that their checkpoints go to."""

    folder: Path
    environment: dict[str, str]
    store: S3FileSystem

    def train(self, output: Path, *overrides: str) -> None:
        shards = f"data.train.sources.main.shards=[{self.folder / 'set' / 'train'}]"
        arguments = [str(self.folder / "run.yaml"), f"output={output}", shards, *overrides]
        run_ranks(1, cases.train, self.environment, arguments)

    def copies(self, url: str) -> dict[str, set[str]]:
        """Names of checkpoints there, and of their files."""
        found = (path.split("/")[-2:] for path in self.store.find(url))
        copies: dict[str, set[str]] = {}
        for step, name in found:
            copies.setdefault(step, set()).add(name)
        return copies


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """After one run of 6 steps with copies at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("uploads")
    make(folder / "set", samples=32, image_size=24, samples_per_shard=32, workers=1)
    (folder / "run.yaml").write_text(CONFIG + "output: unused\n")
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    patch = pytest.MonkeyPatch()
    with s3_server(port) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        stored = Stored(folder, environment, S3FileSystem(use_listings_cache=False))
        stored.store.mkdir("bucket")
        stored.train(folder / "first" / "small", "checkpoint.upload=s3://bucket/runs/")
        yield stored
    patch.undo()


def events(output: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (output / "checkpoints.jsonl").read_text().splitlines()]
    return [(row["step"], row["event"]) for row in rows]


def test_every_checkpoint_is_copied_whole_before_the_run_ends(stored: Stored) -> None:
    first = stored.folder / "first" / "small"
    assert stored.copies("s3://bucket/runs/small") == {"step-00000003": FILES, "step-00000006": FILES}
    for path in first.glob("checkpoints/step-*/*"):
        assert stored.store.cat_file(f"bucket/runs/small/{path.parent.name}/{path.name}") == path.read_bytes()
    assert sorted(events(first)) == [(3, "uploaded"), (3, "valid"), (6, "uploaded"), (6, "valid")]
    assert json.loads((first / "outcome.json").read_text())["state"] == "completed"


def test_a_run_whose_folder_is_gone_continues_from_the_copy(stored: Stored) -> None:
    elsewhere = stored.folder / "second" / "small"
    stored.train(elsewhere, "checkpoint.upload=s3://bucket/runs", "steps=7", "checkpoint.keep_last=5")
    rows = [json.loads(line) for line in (elsewhere / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [7]
    assert [path.name for path in sorted((elsewhere / "checkpoints").iterdir())] == ["step-00000006", "step-00000007"]
    whole = stored.folder / "first" / "small"
    stored.train(whole, "steps=7")
    (last,) = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][6:]
    assert last["train/loss"] == rows[0]["train/loss"]


def test_a_store_that_refuses_is_told_and_ends_no_run(stored: Stored) -> None:
    output = stored.folder / "third" / "small"
    stored.train(output, "checkpoint.upload=s3://nowhere/runs", "steps=3")
    assert json.loads((output / "outcome.json").read_text())["state"] == "completed"
    assert events(output)[0] == (3, "valid") and set(events(output)[1:]) == {(3, "upload failed")}
    error = json.loads((output / "checkpoints.jsonl").read_text().splitlines()[-1])["error"]
    assert "s3://nowhere/runs/small/step-00000003" in error and "does not exist" in error


def test_what_was_cut_off_or_damaged_there_is_passed_over(
    stored: Stored, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = "bucket/trial"
    stored.store.copy("bucket/runs/small/", f"{base}/", recursive=True)
    stored.store.pipe_file(f"{base}/step-00000008/config.yaml", b"cut off")
    newest = max(stored.copies(f"s3://{base}").keys() - {"step-00000008"})
    damaged = f"{base}/{newest}/rank-00000.safetensors"
    content = bytearray(stored.store.cat_file(damaged))
    content[-1] ^= 1
    stored.store.pipe_file(damaged, bytes(content))
    with caplog.at_level(logging.WARNING):
        fetch_newest(f"s3://{base}", tmp_path / "checkpoints")
    assert f"{newest} is damaged (rank-00000.safetensors does not match its SHA-256); trying the one" in caplog.text
    before = sorted(stored.copies(f"s3://{base}"))[-3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [before]
    shutil.rmtree(tmp_path / "checkpoints" / before)
    for step in stored.copies(f"s3://{base}"):
        stored.store.pipe_file(f"{base}/{step}/manifest.json", b"{}")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint among \d in s3://bucket/trial .*; name another"):
        fetch_newest(f"s3://{base}", tmp_path / "checkpoints")
    fetch_newest("s3://bucket/nothing/yet", tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_copy_that_is_killed_or_takes_too_long_is_told(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step-00000005").mkdir(parents=True)
    (folder.checkpoints / "step-00000005" / "manifest.json").write_text("{}")
    trackers = build_trackers([], RunFacts(tmp_path, "run", "trials", 0, 9, 0, 8, {}))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        uploads = Uploads("s3://bucket/x", folder, trackers)
        uploads.advance()
        assert uploads.in_use == [5]
        (process,) = children("uploader")
        process.kill()
        uploads.finish(60)
        assert uploads.in_use == [] and events(tmp_path) == [(5, "upload failed")]
        uploads.finish(0.5)
        assert children("uploader") == []
    shown = capsys.readouterr().out
    assert "upload failed: checkpoint step-00000005 is not at s3://bucket/x: the process that copies it ended" in shown
    assert "is not at s3://bucket/x: it took longer than checkpoint.upload_wait_s=0.5" in shown
