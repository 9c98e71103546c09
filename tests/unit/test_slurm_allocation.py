"""What a supervisor asks of Slurm from inside a job: stand-ins for Slurm's commands write down how they were called."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.slurm_allocation import SlurmAllocation
from launcher.spec import JobSpec

RUNNING = "echo '7|5_2|RUNNING|None|n1|9:00'"
Commands = Callable[..., Path]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Puts scripts in the place of Slurm's commands, and this process into a job; returns the file of their calls."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)

    def put(**scripts: str) -> Path:
        for name in ("squeue", "scontrol", "scancel", "sbatch"):
            script = f'#!/bin/bash\necho {name} "$@" >>{calls}\n{scripts.get(name, "echo n1")}\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        return calls

    return put


def allocation(folder: Path) -> SlurmAllocation:
    (folder / "run" / "launch").mkdir(parents=True)
    return SlurmAllocation(
        JobSpec(name="x", run=folder / "run", program=[], python="python", workdir=folder, ranks_per_node=1)
    )


def test_a_task_of_an_array_asks_slurm_for_itself_alone(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last task of array 5 is job 5 to Slurm, which takes 5 for the whole array."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    calls = commands(squeue=RUNNING, sbatch="env | grep ^SLURM_ARRAY >&2 && exit 1; echo 8")
    last = allocation(tmp_path)
    last.tell_progress("step 1")
    assert last.requeue() and last.replace_nodes(["n1"])
    told = [line for line in calls.read_text().splitlines() if "show" not in line]
    assert told[0] == "scontrol update JobId=5_2 Comment=step 1"
    assert told[1].endswith("--jobs 5_2") and told[2] == "scontrol requeue 5_2"
    assert told[3].startswith("sbatch --parsable --dependency=afterany:5_2 ")
