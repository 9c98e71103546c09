"""What a supervisor asks of Slurm from inside a job: stand-ins for Slurm's commands write down how they were called."""

from pathlib import Path

import pytest
from slurm_stand_ins import RUNNING, Commands

from launcher.slurm_allocation import SlurmAllocation
from launcher.slurm_commands import NoAnswer
from launcher.spec import JobSpec


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
    calls = commands(sbatch="env | grep ^SLURM_ARRAY >&2 && exit 1; echo 8")
    last = allocation(tmp_path)
    last.tell_progress("step 1")
    assert last.requeue() and last.replace_nodes(["n1"])
    told = [line for line in calls.read_text().splitlines() if "show" not in line]
    assert told[0] == "scontrol update JobId=5_2 Comment=step 1"
    assert told[1].endswith("--jobs 5_2") and told[2] == "scontrol requeue 5_2"
    assert told[3].startswith("sbatch --parsable --dependency=afterany:5_2 ")


DOWN = "echo 'slurm_load error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
UNHEARD = "echo 'Unexpected message received for job 5' >&2; exit 1"


def once(folder: Path, first: str, then: str) -> str:
    """A command that does `first` when it is called for the first time."""
    seen = folder / f"seen-{abs(hash((first, then)))}"
    return f"[ -e {seen} ] || {{ touch {seen}; {first}; }}; {then}"


def test_a_controller_that_restarts_is_asked_again(tmp_path: Path, commands: Commands) -> None:
    calls = commands(scontrol=once(tmp_path, DOWN, "echo n1"), squeue=once(tmp_path, DOWN, RUNNING))
    inside = allocation(tmp_path)
    assert inside.nodes == ("n1",)
    commands(scontrol=once(tmp_path, UNHEARD, "exit 0"), squeue=once(tmp_path, DOWN, RUNNING))
    assert inside.requeue()
    assert calls.read_text().count("requeue 5\n") == 2 and "sbatch" not in calls.read_text()


def test_a_job_of_which_the_controller_says_nothing_is_queued_again(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("launcher.slurm_allocation._LOOK_S", 0.0)
    calls = commands(squeue=DOWN)
    assert allocation(tmp_path).requeue()
    assert "scontrol requeue 5\n" in calls.read_text()
    assert "squeue was given no answer (slurm_load error: Unable to contact" in caplog.text


def test_a_job_that_is_being_ended_is_not_queued_again(tmp_path: Path, commands: Commands) -> None:
    calls = commands(squeue=RUNNING.replace("RUNNING", "COMPLETING"))
    assert not allocation(tmp_path).requeue()
    assert "requeue" not in calls.read_text()


def test_a_requeue_that_was_heard_though_not_answered_is_followed_by_no_second_job(
    tmp_path: Path, commands: Commands
) -> None:
    commands()
    inside = allocation(tmp_path)
    pending = "echo 'Job is pending execution' >&2; exit 1"
    ended = RUNNING.replace("RUNNING", "COMPLETING")
    calls = commands(scontrol=once(tmp_path, UNHEARD, pending), squeue=once(tmp_path, f"{RUNNING}; exit 0", ended))
    assert inside.requeue()
    assert calls.read_text().count("requeue 5\n") == 2 and "sbatch" not in calls.read_text()


def test_a_site_that_forbids_requeueing_gets_a_job_that_follows(tmp_path: Path, commands: Commands) -> None:
    commands()
    inside = allocation(tmp_path)
    calls = commands(scontrol="echo 'Requested operation is presently disabled' >&2; exit 1", sbatch="echo 8")
    assert inside.requeue()
    assert "sbatch --parsable --dependency=afterany:5" in calls.read_text()


def test_a_controller_that_stays_silent_is_named(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.slurm_allocation._PATIENCE_S", 0.0)
    commands(scontrol=DOWN)
    with pytest.raises(NoAnswer, match=r"scontrol was given no answer \(.*controller.*\); is slurmctld up\?"):
        allocation(tmp_path)
