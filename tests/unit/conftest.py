"""Fixtures that several unit tests share."""

from pathlib import Path

import pytest
from published_model import publish
from slurm_stand_ins import Commands, put_commands


@pytest.fixture(scope="session")
def tiny_published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of all four modalities, published once for all tests."""
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """This process is in job 5 on n1, and asks stand-ins for Slurm's commands."""
    for name, value in {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n1",
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launcher.slurm_commands._FIRST_PAUSE_S", 0.001)
    return lambda **scripts: put_commands(tmp_path, scripts)
