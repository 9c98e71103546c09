"""The long drill, by hand: one run on a real cluster is broken in every way, and must end as if it had not been.

    python tests/slurm/drill.py FOLDER

Enter: an empty folder. Leave: a table of what happened, steps done twice and seconds until the run was past where it
had been; then why, doctor, status. Exits 1 where a loss or a sample differs from those of an uninterrupted run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cluster
import psutil
from cluster import SlurmRun, preempt, submit_run, wait_until
from faulty_train import HANG, POISON
from rich.console import Console
from rich.table import Table

from data_pipeline.make import make
from launcher import slurm_commands
from launcher.again import submit_again
from launcher.backends.base import read_submission, standing
from launcher.cancelling import cancel_run
from launcher.diagnosis import doctor_run
from launcher.spec import JobState
from launcher.status import status_of, table_of
from launcher.story import why
from mmpretrain.core import run_files

NODES = 3
"""One more than the run needs, for when one dies."""
OVERRIDES = ("steps=100000", "schedule.kind=constant", "checkpoint.every=20", "checkpoint.keep_last=5")


@dataclass
class Drill:
    """The run, and what was done to it."""

    run: SlurmRun
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def job(self) -> str:
        submitted = read_submission(self.run.run)
        assert submitted is not None
        return submitted.job

    def event(self, name: str, action: Callable[[], object]) -> None:
        """Break the run, wait until it is past where it was, and write down what its history says."""
        attempts, before = len(self.run.history), self.run.step
        began = time.monotonic()
        action()
        self.run.wait_for_step(before + 1, attempt=attempts + 1)
        seconds = time.monotonic() - began
        ended = self.run.history[attempts:]
        told = " / ".join(f"{one.ending}: {one.reason}" for one in ended)
        self.row(name, told, str(sum(one.lost_steps for one in ended)), f"{seconds:.0f}")
        self.run.wait_for_step(self.run.step + 25, attempt=attempts + 1)

    def row(self, *cells: str) -> None:
        self.rows.append((cells[0], cells[1], cells[2], cells[3]))
        Console(width=180).print(*cells, sep=" | ")

    def near_time_limit(self) -> None:
        """Lower the limit of the job, as its owner may, to some two minutes from now."""
        spent = slurm_commands.call("squeue", "--noheader", f"--jobs={self.job}", "--format=%M").strip()
        minutes = int(spent.split(":")[-2]) + 2
        slurm_commands.call("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")

    def kill_node(self, folder: Path) -> None:
        """Everything that runs on the node of rank 1, its daemon included, at once."""
        rank = run_files.read_ranks(self.run.run)[1]
        daemon = int((folder / f"slurmd-{rank.node}.pid").read_text())
        chain = [psutil.Process(rank.pid), *psutil.Process(rank.pid).parents()]
        steps = [one for one in chain if one.pid > 1 and one.pid != os.getpid()]
        os.kill(daemon, signal.SIGKILL)
        for one in steps:
            one.kill()
        (folder / f"slurmd-{rank.node}.pid").unlink()

    def fill_disk(self) -> None:
        """Rank 1 can write no file of more than 100 kB any more; the run gives up, and is queued again with room."""
        began, before = time.monotonic(), self.run.step
        rank = run_files.read_ranks(self.run.run)[1]
        subprocess.run(["prlimit", f"--pid={rank.pid}", "--fsize=100000"], check=True)
        wait_until(lambda: standing(self.run.run).state is JobState.GONE, "the end of the job")
        last = self.run.history[-1]
        assert last.ending == "fatal" and "could not be written" in last.reason, last
        submit_again(self.run.run)
        self.run.wait_for_step(before + 1, attempt=len(self.run.history))
        told = f"{last.ending}: {last.reason}; queued again by hand"
        self.row("disk full at a save", told, str(last.lost_steps), f"{time.monotonic() - began:.0f}")

    def poison(self) -> int:
        """The next loss of rank 1 is NaN; the number of the step that all ranks skipped."""
        path = self.run.run / "skipped.jsonl"
        self.run.signal_rank(1, POISON)
        seconds = wait_until(path.exists, "a skipped step")
        step = int(str(self.run.rows("skipped.jsonl")[0]["step"]))
        self.run.wait_for_step(step + 10)
        told = f"step {step} skipped on all ranks, its samples named in skipped.jsonl"
        self.row("NaN on one rank", told, "0", f"{seconds:.0f}")
        return step


def reference(folder: Path, last_step: int) -> SlurmRun:
    """The same run with no scheduler and nothing done to it, up to a step."""
    output = folder / "whole"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launch, "-m", "mmpretrain.train", str(folder / "run.yaml"), f"output={output}", *OVERRIDES]
    )
    wait_until(lambda: run_files.last_step(output) >= last_step, f"step {last_step} of the uninterrupted run", 3600)
    run_files.ask(output, "stop")
    process.wait(120)
    return SlurmRun(output, "")


def drill(folder: Path) -> int:
    """All of it; the number of steps that differ from the uninterrupted run."""
    (folder / "run.yaml").write_text(cluster.CONFIG.format(folder=folder))
    make(folder / "set", samples=96, image_size=24, samples_per_shard=32, workers=1)
    with cluster.started(folder / "cluster", NODES):
        doing = Drill(submit_run(folder, *OVERRIDES, faulty=True))
        doing.run.wait_for_step(25)
        doing.event("rank killed", lambda: doing.run.signal_rank(1, signal.SIGKILL))
        doing.event("hang of one rank", lambda: doing.run.signal_rank(1, HANG))
        doing.event("preemption with signal", lambda: preempt(NODES, 3))
        doing.event("time limit", doing.near_time_limit)
        slurm_commands.call("scontrol", "update", f"JobId={doing.job}", "TimeLimit=60")  # as its administrator may
        doing.event("scontrol requeue", lambda: slurm_commands.call("scontrol", "requeue", doing.job))
        doing.event("node killed", lambda: doing.kill_node(folder / "cluster"))
        doing.fill_disk()
        cancel_run(doing.run.run, now=False)
        doing.run.wait_for_end()
    with cluster.started(folder / "cluster-without-signal", NODES, user_signal=False):
        submit_again(doing.run.run)
        doing.run.wait_for_step(doing.run.step + 25, attempt=len(doing.run.history))
        doing.event("preemption without signal", lambda: preempt(NODES, 3))
        skipped = doing.poison()
        cancel_run(doing.run.run, now=False)
        doing.run.wait_for_end()
    report(doing)
    return compare(doing.run, reference(folder, skipped), skipped)


def compare(run: SlurmRun, whole: SlurmRun, skipped: int) -> int:
    """Losses before the skipped step, and samples of every step, against those of the uninterrupted run."""
    losses, expected = run.losses(), whole.losses()
    wrong = [step for step in range(1, skipped) if losses[step] != expected[step]]
    samples, right = run.rows("samples.jsonl"), whole.rows("samples.jsonl")
    common = min(len(samples), len(right))
    twice = len(samples) - len({row["step"] for row in samples})
    Console().print(
        f"{skipped - 1} losses compared bitwise, {len(wrong)} differ; samples of {common} steps compared, "
        f"{'equal' if samples[:common] == right[:common] else 'THEY DIFFER'}; {twice} steps seen twice"
    )
    return len(wrong) + twice + (samples[:common] != right[:common])


def report(doing: Drill) -> None:
    table = Table("what was done", "what its history says", "steps done twice", "seconds", title="The drill")
    for row in doing.rows:
        table.add_row(*row)
    console = Console(width=180)
    console.print(table)
    console.print(why(doing.run.run), doctor_run(doing.run.run), table_of([status_of(doing.run.run)]), sep="\n\n")


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(min(1, drill(place)))
