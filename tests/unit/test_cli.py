"""The command line as a user meets it: exit codes, messages on stderr, and an answer at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmpretrain.cli import main

DEMO = str(Path(__file__).resolve().parents[2] / "configs" / "demo.yaml")


def run(*arguments: str) -> int:
    """Exit code of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in ("demo", "data", "config", "train", "eval", "publish", "report"):
        assert command in shown


def test_show_prints_the_resolved_config_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "show", DEMO, "steps=77", "optimizer.lr=1e-5") == 0
    shown = capsys.readouterr().out
    assert "steps: 77\n" in shown
    assert "  lr: 1.0e-05\n" in shown
    assert "  keep_last: 2\n" in shown


def test_check_says_ok_or_every_fault_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "check", DEMO) == 0
    assert capsys.readouterr().out == f"{DEMO}: ok\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("defaults: [demo]\nstepz: 3\nseed: one\n")
    assert run("config", "check", DEMO, str(bad), "precision=fp64") == 2
    captured = capsys.readouterr()
    precision = "command line: precision=fp64: saw 'fp64' (text), expected 'fp32', 'bf16' or 'fp16'; did you mean fp16?"
    assert captured.err.splitlines() == [
        f"error: {precision}",
        f"error: {bad}:2: stepz: unknown key; did you mean steps?",
        f"error: {bad}:3: seed: saw 'one' (text), expected an integer",
        f"error: {precision}",
    ]


def test_schema_knows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema") == 0
    shown = capsys.readouterr().out
    for kind in ("infonce", "siglip", "mlm", "mae", "native", "joint", "cosine"):
        assert f'"{kind}"' in shown


def test_faults_of_a_run_file_exit_2_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", DEMO, "stepz=1") == 2
    assert capsys.readouterr().err == "error: command line: stepz=1: unknown key; did you mean steps?\n"
    assert run("train", "none.yaml") == 2
    assert capsys.readouterr().err == "error: none.yaml: there is no such file\n"


def test_ranks_name_themselves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run("train", "none.yaml") == 2
    assert capsys.readouterr().err == "[rank 1] error: none.yaml: there is no such file\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["config", "show"], ["train", "--steps=3"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


def test_the_ecosystems_way_in_is_the_same_command() -> None:
    for entry in (["-m", "mmpretrain.train"], ["-m", "mmpretrain", "train"]):
        result = subprocess.run([sys.executable, *entry, "--help"], capture_output=True, text=True)
        assert result.returncode == 0
        assert "train [OPTIONS] {CONFIG} [key=value]..." in result.stdout


def test_fine_tuning_has_the_same_ways_in() -> None:
    for entry in (["-m", "mmpretrain.finetune"], ["-m", "mmpretrain", "finetune"]):
        result = subprocess.run([sys.executable, *entry, "--help"], capture_output=True, text=True)
        assert result.returncode == 0
        assert "finetune [OPTIONS] {CONFIG}" in result.stdout and "--from" in result.stdout


def test_the_installed_command_answers() -> None:
    command = Path(sys.executable).parent / "mmpretrain"
    result = subprocess.run([command, "config", "--help"], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0
    assert "schema" in result.stdout


def test_a_run_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = tmp_path / "none"
    assert run("report", str(none)) == 3
    assert run("eval", str(none)) == 5
    assert run("publish", str(none), "--to-dir", str(tmp_path / "out")) == 5
    errors = capsys.readouterr().err.splitlines()
    assert [error for error in errors if str(none) in error] == [
        f"error: {none} is no folder; name the `output` of a run",
        f"error: {none} has no checkpoint; name a run folder that has saved one, or a checkpoint itself",
        f"error: {none} has no checkpoint; name a run folder that has saved one, or a checkpoint itself",
    ]
