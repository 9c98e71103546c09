"""`mmpretrain why RUN`: what happened to a run, attempt by attempt, and what it cost.

Enter: a run folder with a history. Leave: lines of text: when, how long, which steps, on what, why it ended and what
followed; then goodput. Refused: a folder that no launcher has run.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from launcher.history import Action, Attempt, Ending, History
from launcher.progress import counted, duration
from launcher.status import RunStatus, status_of
from mmpretrain.core.errors import ClusterError

_FOLLOWED = {
    Action.DONE: "ended as it should",
    Action.RESTART: "started again at once",
    Action.REQUEUE: "queued again",
    Action.REPLACE_NODES: "queued again on other nodes",
    Action.LEFT: "queued again if the scheduler wants it",
    Action.STOP: "stopped for good",
}


@dataclass(frozen=True)
class Goodput:
    """Time that led somewhere, of all time that nodes were held."""

    productive_s: float
    allocated_s: float
    lost_steps: int

    @property
    def share(self) -> float:
        return self.productive_s / self.allocated_s if self.allocated_s else 0.0


def why(run: Path) -> str:
    """The whole story."""
    attempts = History(run).read()
    status = status_of(run)
    current = History(run).current()
    if not attempts and current is None:
        raise ClusterError(f"{run} has no history: no launcher has run it; `mmpretrain report {run}` shows its curves")
    lines = [f"{run.name}: {status.state}" + (f", {status.detail}" if status.detail else "")]
    followers = [*attempts[1:], None]
    lines += [line for each in zip(attempts, followers, strict=True) for line in _lines(*each)]
    if current is not None:
        lines.append(_current_line(current, status))
    if attempts:
        lines += ["", _summary(attempts)]
    return "\n".join(lines)


def goodput(attempts: Sequence[Attempt]) -> Goodput:
    """Of steps done in an attempt, those that its newest checkpoint holds count, or that need not be done again."""
    productive = allocated = 0.0
    for attempt in attempts:
        spent = attempt.ended - attempt.began
        allocated += spent
        done = attempt.step - attempt.from_step
        kept = attempt.step if attempt.ending is Ending.COMPLETED else attempt.saved_step
        training = spent - (attempt.first_step_s or spent)
        productive += training * max(0, kept - attempt.from_step) / done if done > 0 else 0.0
    return Goodput(productive, allocated, sum(one.lost_steps for one in attempts if one.ending is not Ending.COMPLETED))


def _lines(attempt: Attempt, later: Attempt | None) -> Iterator[str]:
    spent = duration(attempt.ended - attempt.began)
    steps = f"steps {attempt.from_step} to {attempt.step}" if attempt.step > attempt.from_step else "no step"
    yield (
        f"  {_clock(attempt.began)}  attempt {attempt.attempt}, {spent} on {', '.join(attempt.nodes)} "
        f"(job {attempt.job}): {steps}, {attempt.ending}"
    )
    lost = f"; {counted(attempt.lost_steps, 'step')} to do again" if attempt.lost_steps else ""
    yield f"      {attempt.reason}{lost}; {_FOLLOWED[attempt.action]}{_recovery(attempt, later)}"


def _recovery(attempt: Attempt, later: Attempt | None) -> str:
    """How long it took without a person's help."""
    recovered = None if later is None else attempt.recovered_s(later)
    if recovered is None or attempt.action in (Action.DONE, Action.STOP):
        return ""
    since = "its end" if attempt.asked is None else "it was told to end"
    return f", training again {duration(recovered)} after {since}"


def _current_line(current: Attempt, status: RunStatus) -> str:
    step = current.from_step if status.heartbeat is None else max(current.from_step, status.heartbeat.step)
    return (
        f"  {_clock(current.began)}  attempt {current.attempt}, {duration(time.time() - current.began)} so far on "
        f"{', '.join(current.nodes)} (job {current.job}): from step {current.from_step}, now {step}"
    )


def _summary(attempts: Sequence[Attempt]) -> str:
    good = goodput(attempts)
    waits = [
        later.began - earlier.ended
        for earlier, later in pairwise(attempts)
        if earlier.action in (Action.REQUEUE, Action.REPLACE_NODES)
    ]
    waited = f", {duration(sum(waits))} between jobs" if waits else ""
    return (
        f"{counted(len(attempts), 'attempt')}, {counted(good.lost_steps, 'step')} done twice, "
        f"goodput {100 * good.share:.0f}% of {duration(good.allocated_s)} on nodes{waited}"
    )


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))
