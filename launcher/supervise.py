"""`python -m launcher.supervise RUN [--local]`: the attempts of a run from preflight to what follows each end.

Enter: the job of a run folder, and signals of the scheduler. Leave: a line of history for each attempt, and 0 where the
run is done or queued again. `outcome.json` alone says how an attempt ended; it is deleted before each. Refused: a
process that is in no Slurm job, unless it is told to use this machine alone.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launcher import bad_nodes, preflight, stacks
from launcher.allocation import ENDED, SCHEDULERS_REASONS, Allocation, LocalAllocation
from launcher.history import Action, Attempt, Decision, Ending, History, decide
from launcher.progress import progress_line
from launcher.slurm_allocation import SlurmAllocation
from launcher.spec import JobSpec, read_spec
from launcher.watchdog import Stall, Watchdog
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError, MMPretrainError
from mmpretrain.core.run_files import Outcome

log = logging.getLogger(__name__)

POLL_S = 1.0
STACKS_WAIT_S = 10.0
OUTCOME_WAIT_S = 3.0
"""A shared file system may show a file a moment after it was written."""


@dataclass(frozen=True)
class _End:
    """How an attempt ended, before it is written down."""

    ending: Ending
    reason: str
    bad_nodes: tuple[str, ...] = ()
    first_step_s: float | None = None
    asked_by_scheduler: bool = False
    asked: float | None = None
    """When it was told to end."""


class Supervisor:
    """Runs attempts until the run is done, or somebody else has to go on."""

    def __init__(self, spec: JobSpec, allocation: Allocation) -> None:
        self.spec, self.allocation = spec, allocation
        self.history = History(spec.run)
        self.asked = ""
        """What the scheduler's signal means; empty until there is one."""
        self.asked_at: float | None = None
        """When that signal came."""

    def listen(self) -> None:
        """From now on signals ask the ranks to save and stop."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked_at = time.time()
            self.asked = self.allocation.stop_reason(number)
            if not self._owner_asks():
                run_files.ask(self.spec.run, "stop", self.asked)

    def _owner_asks(self) -> bool:
        """Whether a stop waits that a person asked for, which wins over a scheduler's: no job follows it."""
        text = run_files.read_request(self.spec.run / run_files.CONTROL / "stop")
        return text is not None and text not in SCHEDULERS_REASONS

    def run(self) -> int:
        """All attempts; returns the exit code."""
        self.history.end_lost()
        self._forget_old_stop()
        if self._is_done():
            log.info("the run was done in this job already, which its scheduler began again; nothing is left to do")
            return 0
        while True:
            past = self.history.read()
            attempt = self.history.begin(self.allocation.nodes, self.allocation.job)
            log.info("attempt %d from step %d on %s", attempt.attempt, attempt.from_step, ", ".join(attempt.nodes))
            end = self._attempt(attempt)
            decision = self._write_down(past, attempt, end)
            log.info("attempt %d %s: %s; next: %s", attempt.attempt, end.ending, decision.reason, decision.action)
            if decision.action is not Action.RESTART:
                return self._leave(decision, end)

    def _is_done(self) -> bool:
        """Whether this job brought the run to its end, or saw its owner cancel it, and was requeued nevertheless."""
        past = self.history.read()
        done = bool(past) and past[-1].action is Action.DONE and past[-1].job == self.allocation.job
        return done and self.allocation.requeues

    def _forget_old_stop(self) -> None:
        """What a scheduler asked of an allocation that is gone; what a person asked stays."""
        if not self.asked and not self._owner_asks():
            self._take_stop()

    def _take_stop(self) -> None:
        (self.spec.run / run_files.CONTROL / "stop").unlink(missing_ok=True)

    def _attempt(self, attempt: Attempt) -> _End:
        (self.spec.run / run_files.OUTCOME).unlink(missing_ok=True)
        began = time.monotonic()
        verdict = self._preflight(attempt)
        if verdict.faults:
            return _End(Ending.UNFIT, "; ".join(verdict.faults[:5]), verdict.bad_nodes)
        if self.asked:
            reason = f"{self.asked}, before training began"
            return _End(Ending.PREEMPTED, reason, asked_by_scheduler=True, asked=self.asked_at)
        process = self.allocation.start(attempt.attempt, verdict.port)
        watchdog = Watchdog(self.spec.cluster.limits, run_files.read_heartbeat(self.spec.run), time.monotonic())
        stall = self._watch(process, watchdog)
        seen = watchdog.first_step_at
        return replace(self._end(attempt, process, stall), first_step_s=None if seen is None else seen - began)

    def _preflight(self, attempt: Attempt) -> preflight.Verdict:
        arguments = ["launcher.preflight", str(self.spec.run), str(attempt.attempt)]
        self.allocation.on_every_node("preflight", arguments)
        return preflight.judge(attempt.nodes, preflight.read_reports(self.spec.run, attempt.attempt))

    def _watch(self, process: subprocess.Popen[bytes], watchdog: Watchdog) -> Stall | None:
        """Until the ranks are gone, or no longer move; ranks that said how they ended are given time to be gone."""
        told = time.monotonic()
        last_word: float | None = None
        while True:
            try:
                process.wait(POLL_S)
                return None
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if run_files.read_outcome(self.spec.run) is not None:
                last_word = last_word or now
                if now - last_word > self.spec.cluster.shutdown_s:
                    return None
                continue
            stall = watchdog.look(run_files.read_heartbeat(self.spec.run), now)
            if stall is not None:
                return stall
            if self._take_stacks_request():
                self._signal_ranks()
            if now - told >= self.spec.cluster.progress_every_s and watchdog.newest is not None:
                self.allocation.tell_progress(progress_line(watchdog.newest))
                told = now

    def _end(self, attempt: Attempt, process: subprocess.Popen[bytes], stall: Stall | None) -> _End:
        if stall is not None:
            where = self._gather_stacks(attempt)
            self.allocation.kill(attempt.attempt, process)
            return _End(Ending.HUNG, f"{stall}: {where}")
        outcome = self._outcome()
        if process.poll() is None:
            self.allocation.kill(attempt.attempt, process)
        if outcome is not None:
            asked = outcome.reason in SCHEDULERS_REASONS or outcome.reason.startswith(("signal", "a signal"))
            reason = (self.asked if asked else "") or outcome.reason
            cause = f"{reason}; " if outcome.state == "preempted" else ""
            told = self.asked_at or outcome.asked
            return _End(Ending(outcome.state), cause + outcome.message, asked_by_scheduler=asked, asked=told)
        if silent := self.allocation.silent_nodes():
            return _End(Ending.CRASHED, f"{', '.join(silent)} no longer answers", tuple(silent))
        if self.asked:
            reason = f"{self.asked}; the ranks ended before they could save"
            return _End(Ending.PREEMPTED, reason, asked_by_scheduler=True, asked=self.asked_at)
        return _End(Ending.CRASHED, "ranks ended without an outcome; the last lines of logs/job.log say more")

    def _outcome(self) -> Outcome | None:
        deadline = time.monotonic() + OUTCOME_WAIT_S
        while True:
            outcome = run_files.read_outcome(self.spec.run)
            if outcome is not None or time.monotonic() > deadline:
                return outcome
            time.sleep(0.2)

    def _take_stacks_request(self) -> bool:
        path = self.spec.run / run_files.CONTROL / "stacks"
        found = path.is_file()
        if found:
            path.unlink(missing_ok=True)
        return found

    def _signal_ranks(self) -> None:
        self.allocation.on_every_node("signal", ["launcher.signal_ranks", str(self.spec.run), "SIGUSR2"])

    def _gather_stacks(self, attempt: Attempt) -> str:
        """Stacks of all ranks into `stacks/attempt-N`; where they stand, in words."""
        files = [run_files.stack_file(self.spec.run, one.rank) for one in run_files.read_ranks(self.spec.run)]
        for file in files:
            if file.exists():
                os.truncate(file, 0)
        self._signal_ranks()
        deadline = time.monotonic() + STACKS_WAIT_S
        while time.monotonic() < deadline and not all(file.exists() and file.stat().st_size for file in files):
            time.sleep(0.2)
        return stacks.collect(self.spec.run, self.spec.run / run_files.STACKS / f"attempt-{attempt.attempt}")

    def _write_down(self, past: Sequence[Attempt], attempt: Attempt, end: _End) -> Decision:
        known = replace(
            attempt,
            ending=end.ending,
            reason=end.reason,
            bad_nodes=end.bad_nodes,
            first_step_s=end.first_step_s,
            asked=end.asked,
        )
        measured = self.history.measured(known)
        queue_again = end.asked_by_scheduler and self.allocation.requeues
        decision = decide(past, measured, queue_again, self.spec.cluster.restarts)
        if self.asked == ENDED and decision.action in (Action.RESTART, Action.REQUEUE):
            decision = Decision(Action.LEFT, decision.reason)
        elif self.asked and decision.action is Action.RESTART:
            decision = Decision(Action.REQUEUE if self.allocation.requeues else Action.DONE, decision.reason)
        if decision.action is Action.REPLACE_NODES and not self.allocation.requeues:
            decision = Decision(Action.STOP, decision.reason)
        if self._owner_asks() and decision.action is not Action.STOP:
            decision = Decision(Action.DONE, decision.reason)
        self.history.end(replace(measured, action=decision.action, reason=decision.reason))
        return decision

    def _leave(self, decision: Decision, end: _End) -> int:
        if decision.action in (Action.DONE, Action.STOP) or not self._owner_asks():
            self._take_stop()  # an owner's that came since the decision is for the job that follows
        if decision.action in (Action.DONE, Action.LEFT):
            return 0
        if decision.action is Action.REQUEUE:
            queued = self.allocation.requeue()
            log.info("the job is queued again" if queued else "the job is not queued again")
            return 0
        if decision.action is Action.REPLACE_NODES:
            bad_nodes.remember(self.spec.run.parent, end.bad_nodes, end.reason)
            if self.allocation.replace_nodes(end.bad_nodes):
                log.info("queued again without %s", ", ".join(end.bad_nodes))
                return 0
        log.error("stopped: %s", decision.reason)
        return ClusterError.exit_code


def main(run: Path, local: bool) -> int:
    """Supervise the run of a folder, on this machine alone or in the Slurm job that this process is in."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s launcher: %(message)s", datefmt="%H:%M:%S")
    try:
        spec = read_spec(run)
        if not local and "SLURM_JOB_ID" not in os.environ:
            raise ClusterError(f"this is no Slurm job; start the run with `mmpretrain submit --again {run}`")
        supervisor = Supervisor(spec, LocalAllocation(spec) if local else SlurmAllocation(spec))
        supervisor.listen()
        return supervisor.run()
    except MMPretrainError as fault:
        log.error("%s", fault)
        return fault.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), local=sys.argv[2:] == ["--local"]))
