"""Stages of the demo and the gate: commands side by side tell whose line is whose, and a failure is named."""

import pytest

from mmpretrain.demo import DemoError, run_stages


def test_commands_side_by_side_number_their_lines_and_the_one_that_fails_is_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DemoError, match="^`mmpretrain nonsense` ended with exit code 2; its message is above$"):
        run_stages([("Two at once", [["mmpretrain", "--help"], ["mmpretrain", "nonsense"]])])
    told = capfd.readouterr().err
    assert "Two at once" in told and "$ mmpretrain --help" in told
    lines = told.splitlines()
    assert any(line.startswith("0 | ") and "Usage" in line for line in lines)
    assert any(line.startswith("1 | ") and "No such command 'nonsense'" in line for line in lines)
