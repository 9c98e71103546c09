"""`mmpretrain chaos`: a run is broken in every way a place allows, and must end as if it had not been.

Enter: a run that trains, where it is, how many minutes it may take. Leave: a row for each fault, told from the run's
own records: what its history says, steps done twice, seconds until it trained again and until it was past where it
had been. Refused: a run that does not come back before a deadline.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.table import Table

from launcher.again import submit_again
from launcher.cancelling import cancel_run
from launcher.chaos.faults import NAN, Fault, Site
from launcher.chaos.subject import Row, Subject
from launcher.history import Attempt
from mmpretrain.core.errors import ClusterError

_SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Told:
    """What became of one fault."""

    fault: Fault
    story: str
    done_twice: int | None = None
    """Steps; None where the fault was not tried."""
    training_s: float | None = None
    """Seconds from the fault to the end of the first new step; None where training never stopped."""
    caught_up_s: float | None = None
    """Seconds until it was past where it had been."""

    @property
    def cells(self) -> tuple[str, ...]:
        figures = (self.done_twice, self.training_s, self.caught_up_s)
        return (self.fault.words, self.story, *("-" if one is None else f"{one:.0f}" for one in figures))


@dataclass
class Drill:
    """Faults one after the other, on one run."""

    subject: Subject
    site: Site
    steps_between: int
    """So many steps are done between two faults, enough for a checkpoint."""
    tell: Callable[[Told], None]
    """Called with each row as it comes."""
    told: list[Told] = field(default_factory=list)

    def go(self, faults: Sequence[Fault], minutes: float) -> None:
        """All of them in turn; none is begun once the minutes are over."""
        end = time.monotonic() + 60 * minutes
        self.subject.wait_for_step(self.steps_between)
        for fault in faults:
            if obstacle := fault.obstacle(self.site):
                self._note(Told(fault, f"not tried: {obstacle}"))
            elif time.monotonic() > end:
                self._note(Told(fault, f"not tried: the {minutes:g} minutes were over"))
            elif fault is NAN:
                self._note(self._poison())
            else:
                self._note(self._break(fault))
                fault.mend(self.site)
                self._recover(fault)

    @property
    def skipped(self) -> list[int]:
        """Steps that left the weights as they were."""
        return [int(str(row["step"])) for row in self.subject.rows(_SKIPPED)]

    def table(self) -> Table:
        """All rows."""
        headings = ("what happens", "what its history says", "steps done twice", "s to train again", "s to catch up")
        table = Table(title="The drill", title_justify="left", show_lines=True)
        for heading in headings[:2]:
            table.add_column(heading, overflow="fold")
        for heading in headings[2:]:
            table.add_column(heading, justify="right", max_width=10)
        for row in self.told:
            table.add_row(*row.cells)
        return table

    def _note(self, row: Told) -> None:
        self.told.append(row)
        self.tell(row)

    def _break(self, fault: Fault) -> Told:
        before, done = self.subject.step, len(self.subject.history)
        struck = time.time()
        fault.strike(self.subject, self.site)
        if fault.ends_job:
            self.subject.wait_for_end()
            submit_again(self.subject.run)
        self.subject.wait_for_step(before + 1, attempt=done + 1)
        ended = self.subject.history[done:]
        self.subject.wait_for_step(max(one.step for one in ended) + 1, attempt=done + 1)
        return self._told(fault, struck, ended)

    def _told(self, fault: Fault, struck: float, ended: Sequence[Attempt]) -> Told:
        story = " / ".join(f"{one.ending}: {one.reason}" for one in ended)
        if fault.ends_job:
            story += "; queued again by hand"
        twice, furthest = sum(one.lost_steps for one in ended), max(one.step for one in ended)
        current, rows = self.subject.current, self.subject.steps()
        since = ended[-1].ended if current is None else current.began
        again, past = (_seconds_to_step(rows, struck, since, step) for step in (0, furthest))
        return Told(fault, story, twice, again, past)

    def _recover(self, fault: Fault) -> None:
        """Train for a while, in a job that is as good as the first."""
        if fault.wears_job:
            done = len(self.subject.history)
            cancel_run(self.subject.run, now=False)
            self.subject.wait_for_end()
            submit_again(self.subject.run)
            self.subject.wait_for_step(1, attempt=done + 1)
        self.subject.wait_for_step(self.subject.step + self.steps_between)

    def _poison(self) -> Told:
        """The run goes on; what it skips, all ranks skip."""
        struck, known = time.time(), len(self.skipped)
        NAN.strike(self.subject, self.site)
        self.subject.wait(lambda: len(self.skipped) > known, "a skipped step")
        step = self.skipped[-1]
        self.subject.wait_for_step(step + 10)
        story = f"step {step} skipped on all ranks, its samples named in {_SKIPPED}"
        return Told(NAN, story, 0, None, _seconds_to_step(self.subject.steps(), struck, struck, step))

    def end(self) -> None:
        """Stop the run, with a checkpoint."""
        cancel_run(self.subject.run, now=False)
        self.subject.wait_for_end()


@contextmanager
def ended_afterwards(subject: Subject) -> Iterator[None]:
    """Whatever happens within the block, no job of the run is left."""
    try:
        yield
    finally:
        if not subject.is_gone:
            cancel_run(subject.run, now=True)


def train_whole(whole: Subject, steps: int) -> None:
    """Let another run, to which nothing is done, come as far; then stop it."""
    with ended_afterwards(whole):
        whole.wait_for_step(steps)
        cancel_run(whole.run, now=False)
        whole.wait_for_end()


def chosen(faults: Sequence[Fault], names: str | None) -> list[Fault]:
    """Those of a list of names, in the drill's order; all without one."""
    wanted = [fault.name for fault in faults] if names is None else names.split(",")
    known = {fault.name: fault for fault in faults}
    if unknown := [name for name in wanted if name not in known]:
        raise ClusterError(f"there is no fault {', '.join(unknown)} here; choose among {', '.join(known)}")
    return [fault for fault in faults if fault.name in wanted]


def _seconds_to_step(rows: Sequence[Row], struck: float, since: float, past: int) -> float | None:
    """From the fault to the first step beyond `past` that was done after `since`."""
    times = (float(str(row["time"])) for row in rows if int(str(row["step"])) > past)
    return next((one - struck for one in times if one > since), None)
