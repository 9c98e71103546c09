"""Whole attempts under a supervisor: a small script is the interpreter of a job, for preflight and ranks."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_stand_ins import Commands

from launcher import allocation, bad_nodes, supervise
from launcher.allocation import ENDED
from launcher.history import Action, Ending, History
from launcher.slurm_allocation import SlurmAllocation
from launcher.spec import JobSpec, job_file, read_spec
from launcher.supervise import Supervisor
from mmpretrain.core.run_files import node_name

_INTERPRETER = """#!/bin/bash
cd {run}
if [ "$2" = launcher.preflight ]; then
  mkdir -p preflight/attempt-$4
  report='"clock": 1, "port": 21000, "versions": {{}}, "speeds": {{}}, "faults": [], "gpu_faults": [{faults}]'
  echo '{{"node": "{node}", '"$report}}" >preflight/attempt-$4/node.json
  exit
fi
stops_as() {{ # when control/stop reads so
  for _ in {{1..1000}}; do [ "$(cat control/stop 2>&1)" = "$1" ] && rm control/stop && return; sleep 0.01; done
  exit 1
}}
end() {{ # STATE REASON
  echo '{{"state": "'"$1"'", "step": 1, "message": "1 of 9 steps done", "reason": "'"$2"'", "time": 1.0}}' >outcome.json
}}
{ranks}
"""


@pytest.fixture(autouse=True)
def signal_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they were, after a supervisor has listened; and no wait for what a local disk would show at once."""
    monkeypatch.setattr(supervise, "OUTCOME_WAIT_S", 0.0)
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def submitted(folder: Path, ranks: str, node: str, faults: str = "") -> Path:
    """A run folder whose ranks do what a script says, on a node whose GPUs have some faults."""
    run, interpreter = folder / "run", folder / "interpreter"
    for name in ("launch", "control"):
        (run / name).mkdir(parents=True)
    interpreter.write_text(_INTERPRETER.format(run=run, node=node, ranks=ranks, faults=faults))
    interpreter.chmod(0o755)
    spec = JobSpec(name="x", run=run, program=["x"], python=str(interpreter), workdir=folder, ranks_per_node=1)
    job_file(run).write_text(spec.model_dump_json())
    return run


def test_a_run_of_this_machine_uses_no_slurm_job_that_it_was_submitted_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    run = submitted(tmp_path, "end completed", node_name())
    assert supervise.main(run, local=True) == 0
    (attempt,) = History(run).read()
    assert (attempt.ending, attempt.action, attempt.nodes) == (Ending.COMPLETED, Action.DONE, (node_name(),))


def test_a_supervisor_outside_slurm_that_is_told_of_no_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert supervise.main(submitted(tmp_path, "", "n1"), local=False) == 4
    assert "this is no Slurm job; start the run with `mmpretrain submit --again" in caplog.text


OWNER = "cancelled by its owner"
CANCELLED = {
    "while the ranks save for the scheduler": f"""
        kill -USR1 $PPID; stops_as preemption
        printf '{OWNER}' >control/stop; end preempted preemption""",
    "before the scheduler asks": f"""
        printf '{OWNER}' >control/stop; stops_as '{OWNER}'
        kill -USR1 $PPID; stops_as preemption; end preempted '{OWNER}'""",
    "before a crash": f"printf '{OWNER}' >control/stop",
}


@pytest.mark.parametrize("moment", CANCELLED)
def test_a_run_that_its_owner_cancels_is_not_queued_again(tmp_path: Path, commands: Commands, moment: str) -> None:
    calls = commands()
    run = submitted(tmp_path, CANCELLED[moment], "n1")
    assert supervise.main(run, local=False) == 0
    (attempt,) = History(run).read()
    assert attempt.action is Action.DONE
    assert "requeue" not in calls.read_text() and not (run / "control" / "stop").exists()


def test_a_run_that_only_the_scheduler_stops_is_queued_again(tmp_path: Path, commands: Commands) -> None:
    calls = commands()
    run = submitted(tmp_path, "kill -USR1 $PPID; stops_as preemption; end preempted preemption", "n1")
    assert supervise.main(run, local=False) == 0
    (attempt,) = History(run).read()
    assert (attempt.action, attempt.reason) == (Action.REQUEUE, "preemption; 1 of 9 steps done")
    assert "scontrol requeue 5\n" in calls.read_text()


def test_a_cancelled_job_that_slurm_begins_again_by_itself_does_nothing(tmp_path: Path, commands: Commands) -> None:
    commands()
    run = submitted(tmp_path, f"kill -TERM $PPID; stops_as '{ENDED}'; end preempted '{OWNER}'", "n1")
    assert supervise.main(run, local=False) == 0
    assert supervise.main(run, local=False) == 0
    assert [attempt.action for attempt in History(run).read()] == [Action.DONE]


def test_the_scheduler_takes_no_place_of_a_stop_that_the_owner_asked_for(tmp_path: Path, commands: Commands) -> None:
    commands()
    run = submitted(tmp_path, "", "n1")
    supervisor = Supervisor(read_spec(run), SlurmAllocation(read_spec(run)))
    supervisor.listen()
    (run / "control" / "stop").write_text(OWNER)
    signal.raise_signal(signal.SIGUSR1)
    assert (supervisor.asked, (run / "control" / "stop").read_text()) == ("preemption", OWNER)


def test_a_node_with_a_broken_gpu_is_left_out_of_the_next_job(tmp_path: Path, commands: Commands) -> None:
    calls = commands(sbatch="echo 8")
    run = submitted(tmp_path, "", "n1", faults='"GPU 0 is broken"')
    assert supervise.main(run, local=False) == 0
    assert History(run).read()[0].action is Action.REPLACE_NODES and bad_nodes.known(tmp_path) == ["n1"]
    assert "sbatch --parsable --dependency=afterany:5" in calls.read_text()
    assert "--exclude=n1" in (run / "launch" / "job-again.sbatch").read_text()


def test_this_machine_with_a_broken_gpu_stops_since_there_is_no_other(tmp_path: Path) -> None:
    run = submitted(tmp_path, "", node_name(), faults='"GPU 0 is broken"')
    assert supervise.main(run, local=True) == 4
    (attempt,) = History(run).read()
    assert (attempt.action, attempt.reason) == (Action.STOP, f"{node_name()}: GPU 0 is broken")
    assert bad_nodes.known(tmp_path) == []


def test_a_preflight_of_this_machine_that_does_not_end_is_told_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(allocation, "TOOL_TIMEOUT_S", 0.1)
    run = submitted(tmp_path, "", node_name())
    (tmp_path / "interpreter").write_text("#!/bin/bash\nexec sleep 60\n")
    assert supervise.main(run, local=True) == 4
    assert "preflight did not end within 0.1 s" in caplog.text
    assert History(run).read()[0].reason == "gave no report in time"
