"""Whole attempts under a supervisor: a small script is the interpreter of a job, for preflight and ranks."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import supervise
from launcher.history import Action, Ending, History
from launcher.spec import JobSpec, job_file
from mmpretrain.core.run_files import node_name

_INTERPRETER = """#!/bin/bash
cd {run}
if [ "$2" = launcher.preflight ]; then
  mkdir -p preflight/attempt-$4
  report='"clock": 1, "port": 21000, "versions": {{}}, "speeds": {{}}, "faults": []'
  echo '{{"node": "{node}", '"$report}}" >preflight/attempt-$4/node.json
  exit
fi
end() {{ # STATE REASON
  echo '{{"state": "'"$1"'", "step": 1, "message": "1 of 9 steps done", "reason": "'"$2"'", "time": 1.0}}' >outcome.json
}}
{ranks}
"""


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """As they were, after a supervisor has listened."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def submitted(folder: Path, ranks: str, node: str) -> Path:
    """A run folder whose ranks do what a script says."""
    run, interpreter = folder / "run", folder / "interpreter"
    for name in ("launch", "control"):
        (run / name).mkdir(parents=True)
    interpreter.write_text(_INTERPRETER.format(run=run, node=node, ranks=ranks))
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
