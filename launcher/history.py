"""The history of a run: one line for each attempt, written by whoever supervised it, and what to do after each.

Enter: how an attempt ended. Leave: `history.jsonl`, and the decision to go on, queue again, or stop. Nothing here looks
at exit codes: srun returns 0 after a kill and 1 after a good stop. Refused: lines that are no attempt.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.json_text import parse_json

HISTORY = "history.jsonl"
_OPEN = "attempt.json"
_REPLACEMENTS = 10
"""Jobs in a row whose nodes were unfit before the fault counts as the job's own."""


class Ending(StrEnum):
    """How an attempt ended."""

    COMPLETED = "completed"
    PREEMPTED = "preempted"
    """Asked to stop, and saved."""
    FATAL = "fatal"
    """The run itself says that starting it again would not help."""
    CRASHED = "crashed"
    HUNG = "hung"
    UNFIT = "unfit"
    """The preflight found nodes that cannot do it."""
    LOST = "lost"
    """Its supervisor ended without a word: a dead node, or a kill."""


class Action(StrEnum):
    """What follows an attempt."""

    DONE = "done"
    RESTART = "restart"
    """In the same allocation."""
    REQUEUE = "requeue"
    REPLACE_NODES = "replace nodes"
    LEFT = "left to the scheduler"
    """Which ends the job and alone knows whether it queues it again."""
    STOP = "stop"


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks; a line of the history once it has ended."""

    attempt: int
    began: float
    """Seconds since 1970."""
    nodes: tuple[str, ...]
    job: str
    from_step: int
    """Steps that the newest checkpoint had when it began."""
    ended: float = 0.0
    ending: Ending = Ending.LOST
    action: Action = Action.RESTART
    reason: str = ""
    step: int = 0
    """Steps finished when it ended."""
    saved_step: int = 0
    """Steps of the newest checkpoint when it ended."""
    bad_nodes: tuple[str, ...] = field(default=())
    first_step_s: float | None = None
    """Seconds from its beginning until the first new step was finished; None where none was."""
    asked: float | None = None
    """When it was told to end, seconds since 1970; None where nobody told it."""

    @property
    def lost_steps(self) -> int:
        """Steps whose work has to be done again."""
        return max(0, self.step - self.saved_step)

    def recovered_s(self, later: "Attempt") -> float | None:
        """Seconds from when it was told to end, or else from its end, to the first new step of the attempt after it."""
        if later.first_step_s is None:
            return None
        return later.began + later.first_step_s - (self.asked or self.ended)


@dataclass(frozen=True)
class Decision:
    """What to do next, and the sentence that says why."""

    action: Action
    reason: str


def decide(past: Sequence[Attempt], ending: Attempt, asked_by_scheduler: bool, restarts: int) -> Decision:
    """What follows an attempt, given those before it (oldest first)."""
    if ending.ending is Ending.COMPLETED:
        return Decision(Action.DONE, ending.reason)
    if ending.ending is Ending.FATAL:
        return Decision(Action.STOP, ending.reason)
    if ending.ending is Ending.PREEMPTED:
        return Decision(Action.REQUEUE if asked_by_scheduler else Action.DONE, ending.reason)
    if ending.ending is Ending.UNFIT:
        return _after_unfit(past, ending)
    failures = [one for one in past if one.ending in (Ending.CRASHED, Ending.HUNG)]
    if len(failures) >= restarts:
        return Decision(Action.STOP, f"{ending.reason}; the budget of {restarts} restarts is spent")
    if failures and (failures[-1].step, failures[-1].saved_step) == (ending.step, ending.saved_step):
        return Decision(
            Action.STOP,
            f"{ending.reason}; twice after step {ending.step} with no new checkpoint between, so a third "
            f"time would end the same way",
        )
    return Decision(Action.RESTART, ending.reason)


def _after_unfit(past: Sequence[Attempt], ending: Attempt) -> Decision:
    """Other nodes, which cost no restart, unless the fault is the job's."""
    row = [one.ending is Ending.UNFIT for one in past[-_REPLACEMENTS:]]
    if len(row) == _REPLACEMENTS and all(row):
        reason = f"{ending.reason}; so it is for the nodes of {_REPLACEMENTS + 1} jobs in a row"
        return Decision(Action.STOP, reason)
    return Decision(Action.REPLACE_NODES if ending.bad_nodes else Action.STOP, ending.reason)


class History:
    """`history.jsonl` of a run folder; one supervisor at a time writes it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._open = run / "launch" / _OPEN

    def read(self) -> list[Attempt]:
        """Oldest first."""
        path = self.run / HISTORY
        rows = path.read_text(errors="replace").splitlines() if path.is_file() else []
        return [_attempt(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]

    def begin(self, nodes: Sequence[str], job: str) -> Attempt:
        """The next attempt; it stands in `launch/attempt.json` until it ends."""
        saved = run_files.last_saved_step(self.run)
        attempt = Attempt(len(self.read()), time.time(), tuple(nodes), job, saved)
        run_files.replace(self._open, json.dumps(asdict(attempt)) + "\n")
        return attempt

    def end(self, attempt: Attempt) -> None:
        """Append its line."""
        with (self.run / HISTORY).open("a") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")
        self._open.unlink(missing_ok=True)

    def current(self) -> Attempt | None:
        """The attempt that has begun and not ended."""
        return _attempt(self._open.read_text(errors="replace"), str(self._open)) if self._open.is_file() else None

    def end_lost(self) -> None:
        """An attempt that another supervisor left open ended with that supervisor."""
        left = self.current()
        if left is None:
            return
        outcome = run_files.read_outcome(self.run)
        if outcome is not None and outcome.time >= left.began:  # the run had its say, its supervisor had not
            ending, reason = Ending(outcome.state), f"{outcome.reason or 'the job ended'}; {outcome.message}"
            left = replace(left, asked=outcome.asked)
        else:
            ending = Ending.LOST
            reason = "the job ended without a word: its node died, or it was killed before it could save"
        self.end(self.measured(replace(left, ending=ending, action=Action.LEFT, reason=reason)))

    def measured(self, attempt: Attempt) -> Attempt:
        """With when it ended and how far it and its checkpoints came."""
        heartbeat = run_files.read_heartbeat(self.run)
        saved = run_files.last_saved_step(self.run)
        begun = heartbeat is not None and heartbeat.time >= attempt.began and heartbeat.phase != "start"
        last_sign = heartbeat.time if heartbeat is not None and begun else attempt.began
        ended = last_sign if attempt.ending is Ending.LOST else time.time()
        step = max(saved, run_files.last_step(self.run)) if begun else saved
        return replace(attempt, ended=ended, step=step, saved_step=saved)


def _attempt(row: str, place: str) -> Attempt:
    try:
        told = parse_json(row)
        ending, action = Ending(told.pop("ending")), Action(told.pop("action"))
        attempt = run_files.record_of(Attempt, told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(f"{place} is no attempt that a launcher wrote ({error}); mend or remove the line") from error
    if not 0 <= attempt.began <= run_files.LATEST_TIME or not 0 <= attempt.ended <= run_files.LATEST_TIME:
        raise ClusterError(f"{place} is no attempt that a launcher wrote (its times are no times); remove the line")
    return replace(attempt, ending=ending, action=action)
