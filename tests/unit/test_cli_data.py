"""The data commands end to end on a small synthetic set, and their defaults."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from data_pipeline.check import check
from data_pipeline.indexing import index_shards
from data_pipeline.make import make
from data_pipeline.pack import pack
from data_pipeline.preview import preview
from data_pipeline.stats import stats
from mmpretrain import cli_data
from mmpretrain.cli import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (cli_data.make_command, make),
        (cli_data.pack_command, pack),
        (cli_data.index_command, index_shards),
        (cli_data.check_command, check),
        (cli_data.stats_command, stats),
        (cli_data.preview_command, preview),
    ],
)
def test_the_defaults_in_the_help_are_those_of_the_function(
    command: Callable[..., None], function: Callable[..., object]
) -> None:
    ours, theirs = inspect.signature(command).parameters, inspect.signature(function).parameters
    names = {"shards": "patterns"}
    where = ("to", "tasks", "cluster")  # it runs, which is no matter of the function
    assert [names.get(name, name) for name in ours if name not in where] == list(theirs)
    asked = {name: parameter.default for name, parameter in ours.items() if name not in ("out", *where)}
    assert asked == {name: theirs[names.get(name, name)].default for name in asked}


def test_a_set_is_made_indexed_checked_counted_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "shapes"
    size = ["--samples", 40, "--image-size", 24, "--samples-per-shard", 20, "--workers", 1]
    assert run("data", "make", "--out", out, *size) == 0
    folders = sorted({path.parent for path in out.rglob("*.tar")})
    shards = [str(path) for folder in folders for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert sum(sample["__key__"].startswith("train-") for sample in samples) == 40
    for command in ("index", "check", "stats"):
        assert run("data", command, *folders, "--workers", 1) == 0
    assert run("data", "preview", folders[0], "--samples", 4) == 0
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_a_truncated_shard_exits_3_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("data", "make", "--out", tmp_path, "--samples", 10, "--image-size", 24, "--workers", 1)
    shard = sorted(tmp_path.rglob("*.tar"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    assert run("data", "check", shard, "--workers", 1) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert shard.name in error


def test_shards_that_are_not_there_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "stats", tmp_path / "none") == 3
    assert str(tmp_path / "none") in capsys.readouterr().err
